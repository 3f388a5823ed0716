"""Several processes judge the plans of one study; one that is killed costs nothing but its own trial's time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmcompress.errors import CompressError, ExitCode
from llmcompress.search.coordinator import Coordinator
from llmcompress.search.optimizers.base import AskTell
from llmcompress.search.problem import Outcome, Proposal
from llmcompress.search.processes import RESTARTS, WorkerProcesses
from llmcompress.search.study_folder import StudyFolder
from llmcompress.search.worker import work
from tests.search.study.small import (
    Walk, desk, function_judge, outcome, plan_space, problem, searched, study, trials,
)  # fmt: skip

FORK = multiprocessing.get_context("fork")


class Marking:
    """A judge that leaves a file per call; the first in a folder may wait to be killed."""

    fingerprint = "small"

    def __init__(self, folder: Path, *, hangs: int) -> None:
        self._folder, self._hangs = folder, hangs

    def __call__(self, plan, tokens) -> Outcome:
        (self._folder / f"{os.getpid()}-{time.monotonic_ns()}.asked").touch()
        for number in range(self._hangs):
            try:
                (self._folder / f"hung-{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            (self._folder / f"{os.getpid()}.hangs").touch()
            time.sleep(600)
        return outcome(plan, tokens)


def start(folder: StudyFolder, judge: Callable[..., Outcome], url: str | None = None) -> multiprocessing.Process:
    def run() -> None:
        own = desk(folder, trials(folder, url=url), judge)
        work(own, is_wanted=lambda: True, sleep=lambda seconds: time.sleep(0.02))
        own.worker.end()
        os._exit(0)

    process = FORK.Process(target=run)
    process.start()
    return process


def begun(path: Path) -> StudyFolder:
    """A folder with its database: workers may join."""
    folder = study(path)
    trials(folder)
    return folder


def coordinated(folder: StudyFolder, dead: Callable[[], list[str]] | None = None, url: str | None = None) -> list[Outcome]:
    coordinator = Coordinator(
        problem=problem(),
        trials=trials(folder, url=url),
        judge_fingerprint="small",
        desk=None,
        dead_workers=dead or (lambda: [each.name for each in folder.workers() if not each.is_alive]),
        sleep=lambda seconds: time.sleep(0.02),
    )
    found = coordinator.run(AskTell(Walk(trials=12), problem()), 12)
    coordinator.end()
    return found


def killing(folder: StudyFolder, marks: Path, processes: list[multiprocessing.Process], judge: Marking) -> list[str]:
    """Kill whoever hangs, and start another in its place; names of the dead."""
    for mark in marks.glob("*.hangs"):
        os.kill(int(mark.name.partition(".")[0]), signal.SIGKILL)
        mark.unlink()
        processes.append(start(folder, judge))
    for process in processes:
        process.join(0)
    return [each.name for each in folder.workers() if not each.is_alive]


def test_g1_a_killed_worker_costs_one_repetition_and_changes_nothing(tmp_path: Path) -> None:
    import optuna

    whole = searched(study(tmp_path / "whole"), function_judge())
    folder, judge = begun(tmp_path), Marking(tmp_path, hangs=1)
    processes = [start(folder, judge), start(folder, judge)]
    assert coordinated(folder, lambda: killing(folder, tmp_path, processes, judge)) == whole
    for process in processes:
        process.join()
    kept = optuna.load_study(study_name="test", storage=folder.url_of(None)).trials
    failed = [trial for trial in kept if trial.state == optuna.trial.TrialState.FAIL]
    assert len(failed) == 1
    assert [trial.system_attrs["failed_trial"] for trial in kept if trial.system_attrs.get("retry_history")] == [
        failed[0].number
    ]
    assert len(list(tmp_path.glob("*.asked"))) == len(kept)


def test_g1_a_plan_that_kills_every_worker_is_infeasible(tmp_path: Path) -> None:
    folder, judge = begun(tmp_path), Marking(tmp_path, hangs=2)
    processes = [start(folder, judge)]
    found = coordinated(folder, lambda: killing(folder, tmp_path, processes, judge))
    for process in processes:
        process.join()
    assert [each.problem for each in found if not each.is_valid] == ["its worker died, 2 times"]


def test_a_waiting_trial_is_claimed_by_one_worker_only(tmp_path: Path) -> None:
    folder = study(tmp_path)
    found = trials(folder)
    for number in range(6):
        found.enqueue(problem(), Proposal((0,) * len(plan_space().units), number), str(number))
    processes = [start(folder, Marking(tmp_path, hangs=0)) for _ in range(3)]
    found.remember("over", True)
    for process in processes:
        process.join()
    assert sorted(each.key for each in found.finished()) == list("012345")
    assert len(list(tmp_path.glob("*.asked"))) == 6


def test_a_process_that_dies_is_started_again_and_one_that_dies_always_is_told_with_its_last_words(
    tmp_path: Path,
) -> None:
    program = "import pathlib, sys; pathlib.Path(sys.argv[1]).open('a').write('x'); print('no memory left'); sys.exit(7)"
    started = tmp_path / "started"
    with WorkerProcesses(lambda index: [sys.executable, "-ISc", program, str(started)], 1, tmp_path) as crew:
        with pytest.raises(CompressError) as told:
            for _ in range(2000):
                crew.tend()
                time.sleep(0.01)
    assert len(started.read_text()) == 1 + RESTARTS
    assert "no memory left" in told.value.what and told.value.exit_code is ExitCode.RESOURCES


def test_the_heartbeat_of_a_remote_worker_that_stopped_frees_its_trial(tmp_path: Path, monkeypatch) -> None:
    import llmcompress.search.trials as module

    monkeypatch.setattr(module, "GRACE_SECONDS", 1)
    folder = study(tmp_path)
    found = trials(folder)
    found.enqueue(problem(), Proposal((0,) * len(plan_space().units), 4), "key")
    claimed = found.claim("elsewhere")
    assert claimed is not None
    with found.alive(claimed):
        found.retry_dead()
        assert found.claim("here") is None
    time.sleep(2.1)
    found.retry_dead()
    again = found.claim("here")
    assert again is not None and again.key == "key"
