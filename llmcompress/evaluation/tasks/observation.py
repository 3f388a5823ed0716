"""What a model answered to every document of its tasks: kept on disk, compared with another model's later."""

from __future__ import annotations

from pydantic import Field

from llmcompress.records.rows import Record
from llmcompress.records.tasks import TaskDataset, TaskScore

RIGHT = ("acc_norm", "acc", "exact_match")
"""Metrics that tell right from wrong, in the order in which they are preferred as a task's main one."""


class Answer(Record):
    """The answer to one document."""

    document: str
    """Its number and the beginning of its hash: equal in two runs on the same data."""
    scores: dict[str, float]
    """Metrics that are one number per document: 1 and 0 for right and wrong."""
    margin: float | None = None
    """Log-likelihood of the right answer over the best wrong one (or by itself, where there are no others), in nats."""
    text: str | None = None
    """What was generated, if the task generates."""


class TaskAnswers(Record):
    """All answers of one task."""

    task: str
    version: str
    limit: int | None
    shots: int
    chat_template: bool
    scores: tuple[TaskScore, ...]
    main: str
    dataset: TaskDataset | None = None
    answers: tuple[Answer, ...]

    def values(self, metric: str) -> list[float] | None:
        """One number per document; None where the metric has none."""
        found = [each.scores[metric] for each in self.answers if metric in each.scores]
        return found if found and len(found) == len(self.answers) else None


class TaskObservation(Record):
    """What was observed on one model."""

    tasks: tuple[TaskAnswers, ...]
    groups: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Groups of tasks, by the names of their tasks."""


def main_metric(metrics: dict[str, bool]) -> str:
    """The one that comparisons use, of metrics and whether each is one number of 0 or 1 per document."""
    preferred = [name for wanted in RIGHT for name in metrics if name.partition(",")[0] == wanted]
    right_or_wrong = [name for name, holds in metrics.items() if holds]
    return (preferred or right_or_wrong or list(metrics))[0]
