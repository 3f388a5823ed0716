"""Results of tasks, and the same documents answered by two models: flips between right and wrong, paired."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from llmcompress.evaluation.paired import interval, paired
from llmcompress.evaluation.tasks.observation import TaskAnswers, TaskObservation
from llmcompress.records.rows import Which
from llmcompress.records.tasks import TaskComparison, TaskResult


def task_results(found: TaskObservation, of: Which) -> list[TaskResult]:
    """One per task."""
    return [
        TaskResult(
            of=of,
            task=each.task,
            version=each.version,
            documents=len(each.answers),
            limit=each.limit,
            shots=each.shots,
            chat_template=each.chat_template,
            scores=each.scores,
            main=each.main,
            dataset=each.dataset,
        )
        for each in found.tasks
    ]


def task_comparisons(dense: TaskObservation, own: TaskObservation) -> Iterator[TaskComparison]:
    """One per task whose main metric is a number per document, and one per group, over the documents of its tasks."""
    pairs = {before.task: (before, after) for before, after in zip(dense.tasks, own.tasks, strict=True)}
    for task, pair in pairs.items():
        if pair[0].values(pair[0].main) is not None:
            yield _comparison(task, [pair])
    for group, members in own.groups.items():
        inside = [pairs[member] for member in members]
        mains = {before.main for before, _ in inside}
        if len(inside) > 1 and len(mains) == 1 and all(before.values(before.main) is not None for before, _ in inside):
            yield _comparison(group, inside)


def _comparison(name: str, pairs: Sequence[tuple[TaskAnswers, TaskAnswers]]) -> TaskComparison:
    metric = pairs[0][0].main
    before, after = ([each for pair in pairs for each in pair[side].answers] for side in (0, 1))
    assert [each.document for each in before] == [each.document for each in after], "answers to other documents"
    right_before, right = ([each.scores[metric] for each in side] for side in (before, after))
    margins = [(one.margin, other.margin) for one, other in zip(before, after, strict=True)]
    known = [(one, other) for one, other in margins if one is not None and other is not None]
    return TaskComparison(
        task=name,
        metric=metric,
        dense=fmean(right_before),
        compressed=fmean(right),
        change=paired(right_before, right),
        right_to_wrong=interval([float(one > other) for one, other in zip(right_before, right, strict=True)]),
        wrong_to_right=interval([float(one < other) for one, other in zip(right_before, right, strict=True)]),
        margin_change=paired(*zip(*known, strict=True)) if known else None,
    )
