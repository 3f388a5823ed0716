"""Every test runs offline, on one thread, and fails if it tries to reach the network."""

from __future__ import annotations

import os

# read by huggingface_hub and datasets when they are imported, hence before everything else; subprocesses inherit them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# several processes with several threads each would mostly wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import tempfile
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests import warm_python
from tests.cpu_budget import CpuBudget, budget_seconds
from tests.selection import Selection, head_commit, mark_majors, other_major

# dense scores are kept for later runs: those of tests, and no one else's; a test that counts has a folder of its own
_CACHE = tempfile.TemporaryDirectory(prefix="llmcompress-cache-")
os.environ["LLMCOMPRESS_CACHE"] = _CACHE.name

# one thread per test process: the same sums in the same order on every machine, and pytest -n scales
torch.set_num_threads(1)

# the same examples in every run: a failure in CI is one that a contributor can repeat
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


BUDGET, SELECTION = pytest.StashKey[CpuBudget](), pytest.StashKey[Selection]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much of the products runs, see selection.py."""
    group = parser.getgroup("llmcompress")
    group.addoption("--families", choices=["core", "rotating", "all"], default="rotating", help="of passes × families")
    group.addoption("--presets", choices=["quarter", "all"], default="all", help="of the recipes that ship")
    group.addoption("--all", action="store_true", help="the full products; LLMCOMPRESS_TEST_ALL=1 does the same")
    group.addoption("--cpu", action="store_true", help="say what every file costs")


def pytest_configure(config: pytest.Config) -> None:
    """All workers take the selection of the process that started them: a commit in between changes nothing."""
    everything = config.getoption("all") or bool(os.environ.get("LLMCOMPRESS_TEST_ALL"))
    families, presets = ("all", "all") if everything else (config.getoption("families"), config.getoption("presets"))
    commit = config.workerinput["commit"] if hasattr(config, "workerinput") else head_commit()
    config.stash[SELECTION] = Selection(commit, families, presets)
    config.stash[BUDGET] = CpuBudget(enforced=families != "all" and "not slow" in config.getoption("markexpr"))
    config.pluginmanager.register(config.stash[BUDGET])


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """What a worker is told."""
    node.workerinput["commit"] = node.config.stash[SELECTION].commit


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Several workers share the files, not the tests: what a file or a worker prepares is prepared once."""
    if config.getoption("numprocesses", None) and config.option.dist == "no":
        config.option.dist, config.option.loadscopereorder = "loadfile", False


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Which part of the products this run was."""
    terminalreporter.line(config.stash[SELECTION].says())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Before `-m` looks at the marks. Workers take the files that cost most first: none begins one at the end."""
    mark_majors(items)
    gone = {*config.stash[SELECTION].deselect(items), *other_major(items)}
    config.hook.pytest_deselected(items=list(gone))
    items[:] = [item for item in items if item not in gone]
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: -budget_seconds(item.nodeid.partition("::")[0]))


@pytest.fixture(scope="session")
def selection(pytestconfig: pytest.Config) -> Selection:
    """What of the products runs."""
    return pytestconfig.stash[SELECTION]


@pytest.fixture(scope="session")
def stock_python(pytestconfig: pytest.Config) -> Iterator[warm_python.WarmPython]:
    """Fresh processes that know stock libraries only."""
    yield from counted(pytestconfig.stash[BUDGET], warm_python.stock())


@pytest.fixture(scope="session")
def our_python(pytestconfig: pytest.Config) -> Iterator[warm_python.WarmPython]:
    """Fresh processes that have imported us."""
    yield from counted(pytestconfig.stash[BUDGET], warm_python.ours())


def counted(budget: CpuBudget, python: warm_python.WarmPython) -> Iterator[warm_python.WarmPython]:
    """What it uses is used by the tests that ask it."""
    budget.warm.append(python)
    yield python
    budget.warm.remove(python)
    python.close()  # from here on it is a child that ended


class NetworkGuard:
    """Refuses and remembers every attempt to look up or connect to another machine."""

    def __init__(self) -> None:
        self.attempts: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo":
            host = args[0]
        elif event in ("socket.connect", "socket.sendto"):
            host = args[1][0] if isinstance(args[1], tuple) else None
        else:
            return
        if not is_this_machine(host):
            self.attempts.append(f"{event} {host}")
            raise ConnectionRefusedError(f"tests must not touch the network ({event} {host})")


def is_this_machine(host: Any) -> bool:
    """Whether an address is local: loopback, or a Unix socket, which has no host."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


GUARD = NetworkGuard()
# an audit hook sees what every library does, whatever it imported before, and cannot be removed by a test
sys.addaudithook(GUARD)


@pytest.fixture(autouse=True)
def no_network() -> Iterator[None]:
    """Fail the test that touched the network, even if the library swallowed the refusal."""
    GUARD.attempts.clear()
    yield
    attempts = list(GUARD.attempts)
    GUARD.attempts.clear()
    assert not attempts, f"touched the network: {attempts}"
