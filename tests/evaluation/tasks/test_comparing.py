"""Flips and margins, counted by hand."""

from __future__ import annotations

import math

import pytest

from llmcompress.evaluation.paired import interval, paired
from llmcompress.evaluation.tasks.comparing import task_comparisons, task_results
from llmcompress.evaluation.tasks.observation import Answer, TaskAnswers, TaskObservation, main_metric
from llmcompress.records.tasks import TaskScore


def observed(groups: dict[str, tuple[str, ...]] | None = None, **tasks: list[tuple[int, float]]) -> TaskObservation:
    """Tasks as lists of right (1) or wrong (0), and margins."""
    score = TaskScore(metric="acc", value=0.5, standard_error=None, higher_is_better=True)
    found = []
    for name, answers in tasks.items():
        documents = tuple(
            Answer(document=str(number), scores={"acc": right}, margin=margin)
            for number, (right, margin) in enumerate(answers)
        )
        common = {"version": "1", "limit": None, "shots": 0, "chat_template": False, "scores": (score,), "main": "acc"}
        found.append(TaskAnswers(task=name, answers=documents, **common))
    return TaskObservation(tasks=tuple(found), groups=groups or {})


DENSE = [(1, 2.0), (1, 1.0), (0, -1.0), (0, -2.0)]
OWN = [(1, 1.0), (0, -1.0), (0, -1.0), (1, 1.0)]


def test_flips_are_counted_document_by_document():
    (found,) = task_comparisons(observed(a=DENSE), observed(a=OWN))
    assert (found.dense, found.compressed, found.change.mean) == (0.5, 0.5, 0.0)
    assert (found.right_to_wrong.mean, found.wrong_to_right.mean, found.flips) == (0.25, 0.25, 0.5)
    assert found.margin_change.mean == pytest.approx((-1 - 2 + 0 + 3) / 4)
    # paired: changes are 0, -1, 0, 1, of mean 0 and sample variance 2/3
    assert found.change.standard_error == pytest.approx(math.sqrt(2 / 3 / 4))


def test_a_group_counts_the_documents_of_its_tasks_together():
    groups = {"both": ("a", "b")}
    dense, own = observed(groups, a=DENSE, b=[(1, 1.0)]), observed(groups, a=OWN, b=[(0, -1.0)])
    found = {each.task: each for each in task_comparisons(dense, own)}
    assert set(found) == {"a", "b", "both"}
    assert found["both"].change.count == 5 and found["both"].right_to_wrong.mean == pytest.approx(2 / 5)


def test_answers_to_other_documents_are_never_compared():
    with pytest.raises(AssertionError):
        list(task_comparisons(observed(a=DENSE), observed(a=OWN[:2])))


def test_results_are_one_per_task():
    assert [(each.task, each.documents, each.of) for each in task_results(observed(a=DENSE, b=OWN[:1]), "dense")] == [
        ("a", 4, "dense"),
        ("b", 1, "dense"),
    ]


@pytest.mark.parametrize(
    ("metrics", "wanted"),
    [
        ({"acc": True, "acc_norm": True}, "acc_norm"),
        ({"perplexity": False, "acc": True}, "acc"),
        ({"exact_match,strict-match": True, "exact_match,flexible-extract": True}, "exact_match,strict-match"),
        ({"bleu": False, "hit": True}, "hit"),
        ({"word_perplexity": False}, "word_perplexity"),
    ],
)
def test_the_main_metric_tells_right_from_wrong_where_one_does(metrics, wanted):
    assert main_metric(metrics) == wanted


def test_intervals_hold_the_mean_and_repeat():
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0] * 20
    found = interval(values)
    assert found == interval(values) and found.count == 200
    assert found.low < found.mean == 0.6 < found.high
    # the bootstrap and the normal approximation agree on so many independent values
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.standard_error, rel=0.1)
    assert paired(values, values).standard_error == 0
    assert interval([1.0]).standard_error is None
