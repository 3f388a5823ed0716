"""Lines of what models answered and wrote: tasks, robustness, generations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from llmcompress.records.estimate import Estimate, Interval
from llmcompress.records.evaluation import Measured
from llmcompress.records.tasks import (
    GenerationComparison,
    GenerationsResult,
    RobustnessComparison,
    RobustnessResult,
    TaskComparison,
    TaskResult,
)
from llmcompress.report.lines import Better, Line, changed, interval_of

SHARES = ("acc", "exact_match", "pass", "f1", "bleu_acc", "mcc")
"""Beginnings of metrics that are fractions."""


def tasks(measured: Measured) -> Iterable[Line]:
    """The main score of every task, and which answers flipped."""
    found, compared = measured.of_kind(TaskResult), measured.of_kind(TaskComparison)
    dense = {each.protocol: each for each in found if each.of == "dense"}
    changes = {each.task: each for each in compared}
    for each in found:
        if each.of == "dense":
            continue
        score, before, change = each.main_score, dense.get(each.protocol), changes.get(each.task)
        yield Line(
            "task",
            each.main,
            each.task,
            "share" if each.main.startswith(SHARES) else "number",
            "higher" if score.higher_is_better else "lower",
            before.main_score.value if before else None,
            score.value,
            changed(change.change) if change else None,
            protocol=_asked(each),
        )
    if len(compared) > 1:
        yield from _mean([each for each in compared if any(each.task == one.task for one in found)])
    for comparison in compared:
        if all(each.task != comparison.task for each in found):  # a group: its documents have results by task alone
            yield _group(comparison)
        yield _of_one("task", "answers right → wrong", comparison.task, "share", "lower", comparison.right_to_wrong)
        yield _of_one("task", "answers wrong → right", comparison.task, "share", "higher", comparison.wrong_to_right)
        if comparison.margin_change is not None:
            name = "change of the right answer's margin, nats"
            yield _of_one("task", name, comparison.task, "number", "higher", comparison.margin_change)


def _mean(compared: Sequence[TaskComparison]) -> Iterable[Line]:
    """The mean of all tasks, each counted once; their documents are independent, so variances add up."""
    shown = [each for each in compared if each.metric.startswith(SHARES)]
    count = len(shown)
    if count < 2:
        return
    errors = [each.change.standard_error for each in shown]
    known = [each for each in errors if each is not None]
    error = math.sqrt(sum(each**2 for each in known)) / count if len(known) == count else None
    change = sum(each.change.mean for each in shown) / count
    yield Line(
        "task",
        "mean score",
        f"{count} tasks",
        "share",
        "higher",
        sum(each.dense for each in shown) / count,
        sum(each.compressed for each in shown) / count,
        changed(Estimate(mean=change, standard_error=error)),
    )


def _group(found: TaskComparison) -> Line:
    form = "share" if found.metric.startswith(SHARES) else "number"
    change = changed(found.change)
    protocol = f"{found.change.count:,} documents of several tasks"
    return Line(
        "task", found.metric, found.task, form, "higher", found.dense, found.compressed, change, protocol=protocol
    )


def robustness(measured: Measured) -> Iterable[Line]:
    """What noise and other prompts cost, and how much more after compression."""
    found = measured.of_kind(RobustnessResult)
    changes = {(each.subject, each.disturbance): each for each in measured.of_kind(RobustnessComparison)}
    dense = {(each.subject, each.disturbance): each for each in found if each.of == "dense"}
    for each in found:
        if each.of == "dense":
            continue
        key = (each.subject, each.disturbance)
        before, change = dense.get(key), changes.get(key)
        yield Line(
            "robustness",
            f"{each.metric} lost by {each.disturbance}",
            each.subject,
            "share" if each.metric.startswith(SHARES) else "nats",
            "lower",
            before.loss.mean if before else None,
            each.loss.mean,
            changed(change.extra_loss) if change else None,
            protocol=f"seed {each.seed}",
        )


def generations(measured: Measured) -> Iterable[Line]:
    """Length, repetition and variety of texts, and how near they are to the dense model's."""
    found = measured.of_kind(GenerationsResult)
    dense = {each.source: each for each in found if each.of == "dense"}
    changes = {each.source: each for each in measured.of_kind(GenerationComparison)}
    for each in found:
        if each.of == "dense":
            continue
        before, change = dense.get(each.source), changes.get(each.source)
        protocol = f"{len(each.texts)} prompts, at most {each.max_new_tokens} tokens"
        parts: Sequence[tuple[str, str, Better, Interval | None, Interval | None, Interval | None]] = (
            (
                "repeated 4-grams",
                "share",
                "lower",
                before.repetition if before else None,
                each.repetition,
                change.repetition_change if change else None,
            ),
            (
                "tokens written",
                "words",
                "neither",
                before.tokens if before else None,
                each.tokens,
                change.tokens_change if change else None,
            ),
            (
                "instructions followed",
                "share",
                "higher",
                before.followed if before else None,
                each.followed,
                change.followed_change if change else None,
            ),
        )
        for name, form, better, base, value, difference in parts:
            if value is not None:
                yield Line(
                    "generations",
                    name,
                    each.source,
                    form,
                    better,
                    base.mean if base else None,
                    value.mean,
                    changed(difference) if difference else None,
                    protocol=protocol,
                )
        if change is not None:
            yield _of_one("generations", "ROUGE-L to dense", each.source, "share", "higher", change.rouge_l)
            yield _of_one("generations", "same text as dense", each.source, "share", "higher", change.same)


def _asked(found: TaskResult) -> str:
    """How the task was asked."""
    template = ", chat template" if found.chat_template else ""
    return f"{found.documents:,} documents, {found.shots} shots{template}"


def _of_one(kind: str, name: str, on: str, form: str, better: Better, found: Interval) -> Line:
    """A number that exists of the comparison alone."""
    return Line(kind, name, on, form, better, value=found.mean, spread=interval_of(found))
