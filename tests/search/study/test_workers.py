"""Several processes judge the plans of one study; one that is killed costs nothing but its own trial's time."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest

from llmcompress.errors import CompressError, ExitCode
from llmcompress.plan_search.coordinator import Coordinator
from llmcompress.plan_search.optimizers.base import AskTell
from llmcompress.plan_search.problem import Outcome, Proposal
from llmcompress.plan_search.processes import RESTARTS, WorkerProcesses
from llmcompress.plan_search.study_folder import StudyFolder
from tests.search.study.small import Walk, function_judge, plan_space, problem, searched, study, trials
from tests.warm_python import WarmPython

WORKER = """
import sys
from pathlib import Path
from tests.search.study.small import Marking, joined
joined(Path(sys.argv[1]), Marking(Path(sys.argv[1]), hangs=int(sys.argv[2])))
"""
"""Three of them start at the same time; those that hang are killed."""


@contextmanager
def workers(our_python: WarmPython, folder: Path, *, hangs: int) -> Iterator[None]:
    """Until the search is over."""
    running = threading.Thread(
        target=our_python.run_ranks, args=(WORKER, folder, hangs), kwargs={"count": 3, "folder": folder}
    )
    running.start()
    try:
        yield
    finally:
        running.join()


def begun(path: Path) -> StudyFolder:
    """A folder with its database: workers may join."""
    folder = study(path)
    trials(folder)
    return folder


def coordinated(folder: StudyFolder, marks: Path) -> list[Outcome]:
    """A search whose plans others judge; a process that hangs is killed."""

    def dead() -> list[str]:
        for mark in marks.glob("*.hangs"):
            os.kill(int(mark.name.partition(".")[0]), signal.SIGKILL)
            mark.unlink()
        return [each.name for each in folder.workers() if not each.is_alive]

    coordinator = Coordinator(
        problem=problem(),
        trials=trials(folder),
        judge_fingerprint="small",
        desk=None,
        dead_workers=dead,
        sleep=lambda seconds: time.sleep(0.05),
    )
    try:
        return coordinator.run(AskTell(Walk(trials=12), problem()), 12)
    finally:
        coordinator.end()


def test_g1_a_killed_worker_costs_one_repetition_and_changes_nothing(our_python: WarmPython, tmp_path: Path) -> None:
    whole = searched(study(tmp_path / "whole"), function_judge())
    folder = begun(tmp_path)
    with workers(our_python, tmp_path, hangs=1):
        assert coordinated(folder, tmp_path) == whole
    kept = optuna.load_study(study_name="test", storage=folder.url_of(None)).trials
    failed = [trial for trial in kept if trial.state == optuna.trial.TrialState.FAIL]
    assert len(failed) == 1
    again = [trial for trial in kept if trial.system_attrs.get("retry_history")]
    assert [trial.system_attrs["failed_trial"] for trial in again] == [failed[0].number]
    assert len(list(tmp_path.glob("*.asked"))) == len(kept), "no other trial was judged twice"


def test_g1_a_plan_that_kills_every_worker_is_infeasible(our_python: WarmPython, tmp_path: Path) -> None:
    folder = begun(tmp_path)
    found = trials(folder)
    found.enqueue(problem(), Proposal((0,) * len(plan_space().units), 4), "deadly")
    dying = [folder.worker(name) for name in ("one", "two")]
    for each in dying:
        claimed = found.claim(each.name)
        assert claimed is not None and claimed.key == "deadly"
        found.retry_dead([each.name])
    assert found.claim("three") is None
    (over,) = found.finished()
    assert over.outcome.problem == "its worker died, 2 times" and not over.outcome.is_valid


def test_g1_a_repetition_is_not_taken_for_the_dead_workers_while_another_claims_it(tmp_path: Path) -> None:
    """Claiming is two writes, and a repetition begins with what was written of the trial that failed."""
    folder = begun(tmp_path)
    found = trials(folder)
    found.enqueue(problem(), Proposal((0,) * len(plan_space().units), 4), "key")
    one = folder.worker("one")
    assert found.claim(one.name) is not None
    found.retry_dead([one.name])
    assert found.unfinished() == {"key": ""}
    kept = optuna.load_study(study_name="test", storage=folder.url_of(None))
    waiting = next(trial for trial in kept.trials if trial.state == optuna.trial.TrialState.WAITING)
    kept._storage.set_trial_state_values(waiting._trial_id, state=optuna.trial.TrialState.RUNNING)
    found.retry_dead([one.name])
    assert not found.finished() and found.unfinished() == {"key": ""}


def test_a_process_that_dies_is_started_again_and_one_that_dies_always_is_told_with_its_last_words(
    tmp_path: Path,
) -> None:
    program = (
        "import pathlib, sys; pathlib.Path(sys.argv[1]).open('a').write('x'); print('no memory left'); sys.exit(7)"
    )
    started = tmp_path / "started"
    command = [sys.executable, "-ISc", program, str(started)]
    with WorkerProcesses(lambda index: command, 1, tmp_path) as crew, pytest.raises(CompressError) as told:
        for _ in range(2000):
            crew.tend()
            time.sleep(0.01)
    assert len(started.read_text()) == 1 + RESTARTS
    assert "no memory left" in told.value.what and told.value.exit_code is ExitCode.RESOURCES


def test_the_heartbeat_of_a_remote_worker_that_stopped_frees_its_trial(tmp_path: Path, monkeypatch) -> None:
    import llmcompress.plan_search.database as module

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
