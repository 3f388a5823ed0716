"""A search that was killed goes on and ends as if it had not been; nothing is judged twice; faults G1 to G7."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from llmcompress.plan_search.problem import Outcome
from llmcompress.plan_search.study_folder import StudyFolder
from tests.search.study.small import Counting, function_judge, outcome, searched, study, trials


class Killed(BaseException):
    """As SIGKILL ends a process: nothing is caught, nothing is tidied."""


def killed_after(count: int) -> Counting:
    class Dying(Counting):
        def __call__(self, plan, tokens):
            if len(self.asked) == count:
                raise Killed
            return super().__call__(plan, tokens)

    return Dying()


@pytest.mark.parametrize("count", [0, 1, 5, 7])
def test_killed_and_started_again_it_ends_as_if_it_had_not_been(count: int, tmp_path: Path) -> None:
    whole = searched(study(tmp_path / "whole"), function_judge())
    with pytest.raises(Killed):
        searched(study(tmp_path), dying := killed_after(count))
    again = Counting()
    assert searched(study(tmp_path), again) == whole
    assert len(dying.asked) == count and not set(dying.asked) & set(again.asked)


def test_started_again_after_its_end_it_judges_nothing(tmp_path: Path) -> None:
    first = searched(study(tmp_path), function_judge())
    again = Counting()
    assert searched(study(tmp_path), again) == first and not again.asked


def test_g5_a_plan_that_is_proposed_twice_is_judged_once(tmp_path: Path) -> None:
    counting = Counting()
    found = searched(study(tmp_path), counting, count=40)
    assert len(found) == 40
    assert len(counting.asked) == len(set(counting.asked)) == len({(each.plan, each.tokens) for each in found})
    assert len(counting.asked) < 40


def bad(plan, tokens) -> Outcome:
    if plan[2] == 0:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
    if plan[2] == 1:
        return Outcome(plan, tokens, math.nan, {"bytes": 1.0})
    return outcome(plan, tokens)


def test_g4_a_trial_without_a_number_is_infeasible_and_never_the_best(tmp_path: Path) -> None:
    import optuna

    from llmcompress.plan_search.judging import FunctionJudge

    found = searched(study(tmp_path), FunctionJudge(bad, "bad"))
    problems = {each.problem for each in found}
    assert {"out of memory", "the loss is not a finite number", None} == problems
    assert all(not each.is_valid and each.loss == math.inf for each in found if each.problem)
    kept = optuna.load_study(study_name="test", storage=study(tmp_path).url_of(None))
    assert {trial.state for trial in kept.trials} == {optuna.trial.TrialState.COMPLETE}
    assert all(math.isfinite(trial.values[0]) and trial.constraints["failed"] == 0.0 for trial in kept.best_trials)


def test_an_error_that_is_a_bug_is_raised_and_the_search_can_go_on(tmp_path: Path) -> None:
    from llmcompress.plan_search.judging import FunctionJudge

    def broken(plan, tokens):
        raise TypeError("a bug")

    with pytest.raises(TypeError):
        searched(study(tmp_path), FunctionJudge(broken, "small"))
    assert len(searched(study(tmp_path), function_judge())) == 12


def test_g2_a_torn_line_of_outcomes_is_cut_and_told(tmp_path: Path) -> None:
    class Notes:
        def __init__(self):
            self.notes = []

        def note(self, text):
            self.notes.append(text)

    with pytest.raises(Killed):
        searched(study(tmp_path), killed_after(5))
    (file,) = (study(tmp_path).path / "outcomes").iterdir()
    with file.open("a") as torn:
        torn.write('{"key": "abc", "pl')
    told = Notes()
    known = study(tmp_path).outcomes(told)
    assert len(known) == 5 and len(told.notes) == 1 and "18 bytes" in told.notes[0]
    assert searched(study(tmp_path), function_judge()) == searched(study(tmp_path / "whole"), function_judge())


def test_what_a_worker_wrote_down_is_told_to_the_database_later(tmp_path: Path) -> None:
    """It was judged, and its process died before the database had it."""
    folder = study(tmp_path)
    whole = searched(study(tmp_path / "whole"), function_judge())
    worker = folder.worker("earlier")
    worker.begin()
    from llmcompress.plan_search.judging import key_of
    from llmcompress.plan_search.problem import Proposal

    for each in whole[:6]:
        worker.keep(key_of("small", Proposal(each.plan, each.tokens)), each)
    worker.end()
    again = Counting()
    assert searched(folder, again) == whole
    assert not {(each.plan, each.tokens) for each in whole[:6]} & set(again.asked)
    assert {each.key for each in trials(folder).finished()} >= {
        key_of("small", Proposal(each.plan, each.tokens)) for each in whole[:6]
    }


def test_two_in_one_folder_share_what_was_found(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    assert searched(folder, function_judge(), count=6) == searched(folder, Counting(), count=12)[:6]
