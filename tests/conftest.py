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
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests import warm_python

# one thread per test process: the same sums in the same order on every machine, and pytest -n scales
torch.set_num_threads(1)

# the same examples in every run: a failure in CI is one that a contributor can repeat
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


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


@pytest.fixture(scope="session")
def stock_python() -> Iterator[warm_python.WarmPython]:
    """Fresh processes that know stock libraries only."""
    with warm_python.stock() as python:
        yield python


@pytest.fixture(scope="session")
def our_python() -> Iterator[warm_python.WarmPython]:
    """Fresh processes that have imported us."""
    with warm_python.ours() as python:
        yield python


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
