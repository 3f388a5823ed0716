"""Measurements of answers and generated texts: scores of tasks, flips against dense, robustness, generations."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmcompress.records.estimate import Interval
from llmcompress.records.rows import Record, Which


class TaskScore(Record):
    """One metric of a task, as lm-eval computes it."""

    metric: str
    """`acc`, `acc_norm`, `exact_match`, `perplexity`, …; `exact_match,strict` where an answer filter has a name."""
    value: float
    standard_error: float | None
    higher_is_better: bool


class TaskDataset(Record):
    """Where the documents of a task come from, if that is a dataset of the Hub."""

    path: str
    """`ORG/NAME`."""
    config: str
    """`default` where it has only one."""
    split: str
    rows: int
    """Of the whole split, however many of them the task uses."""


class TaskResult(Record):
    """The scores of a task with everything that is needed to reproduce them."""

    kind: Literal["task"] = "task"
    of: Which = "model"
    task: str
    version: str
    """Of the task's definition."""
    documents: int
    limit: int | None
    """Documents that were allowed; None: all."""
    shots: int
    chat_template: bool
    scores: tuple[TaskScore, ...]
    main: str
    """The metric that comparisons and means use."""
    dataset: TaskDataset | None = None
    """None: a file of the user's, or not known."""

    @property
    def main_score(self) -> TaskScore:
        """Its score."""
        return next(each for each in self.scores if each.metric == self.main)

    @property
    def protocol(self) -> tuple[str, str, int, int, bool]:
        """What two results must share to be comparable."""
        return self.task, self.version, self.documents, self.shots, self.chat_template


class TaskComparison(Record):
    """The same documents answered by both models, paired."""

    kind: Literal["task_comparison"] = "task_comparison"
    task: str
    """A task, or a group or several tasks of which all documents count equally."""
    metric: str
    dense: float
    compressed: float
    change: Interval
    """Compressed − dense, per document."""
    right_to_wrong: Interval
    """Fraction of the documents that only the dense model answered right."""
    wrong_to_right: Interval
    """Fraction that only the compressed model answered right."""
    margin_change: Interval | None
    """Log-likelihood of the right answer over the best wrong one (or by itself, where there are no others), in nats."""

    @property
    def flips(self) -> float:
        """Fraction of answers that changed between right and wrong."""
        return self.right_to_wrong.mean + self.wrong_to_right.mean


class RobustnessResult(Record):
    """What a model loses when its input is disturbed."""

    kind: Literal["robustness"] = "robustness"
    of: Which = "model"
    subject: str
    """`task:local_arc_easy`, or `text:builtin:evaluation`."""
    metric: str
    """`acc`, … of a task; `nats_per_byte` of a text, where higher is worse."""
    disturbance: str
    """`noise:0.05` (characters swapped, dropped, doubled), or `prompt:NAME`."""
    seed: int
    clean: float
    disturbed: float
    loss: Interval
    """How much worse, per document or window: positive is worse."""


class RobustnessComparison(Record):
    """How much more the compressed model loses than the dense one, on the same disturbed inputs."""

    kind: Literal["robustness_comparison"] = "robustness_comparison"
    subject: str
    metric: str
    disturbance: str
    seed: int
    dense_loss: float
    compressed_loss: float
    extra_loss: Interval
    """Compressed − dense, paired: positive when compression made the model less robust."""


class GeneratedText(Record):
    """A greedy continuation."""

    prompt: str
    """As shown to people: without chat template."""
    text: str
    tokens: int
    ended: bool
    """Whether the model ended it, not the limit of tokens."""
    checks: dict[str, bool] = Field(default_factory=dict)
    """Verifiable instructions of this prompt, and whether the text follows them."""


class GenerationsResult(Record):
    """Texts generated from prompts, and what can be said of them without another model."""

    kind: Literal["generations"] = "generations"
    of: Which = "model"
    source: str
    """Where the prompts came from."""
    chat_template: bool
    max_new_tokens: int
    texts: tuple[GeneratedText, ...]
    tokens: Interval
    """Length."""
    repetition: Interval
    """Fraction of a text's n-grams of 4 words that stood in it before."""
    distinct_1: float
    """Different words ÷ words, over all texts."""
    distinct_2: float
    """The same for pairs of words."""
    followed: Interval | None
    """Fraction of the verifiable instructions followed; None: the prompts have none."""


class GenerationPair(Record):
    """Both models' texts, side by side."""

    prompt: str
    dense: str
    compressed: str
    rouge_l: float


class GenerationComparison(Record):
    """The compressed model's texts against the dense model's, paired by prompt."""

    kind: Literal["generation_comparison"] = "generation_comparison"
    source: str
    rouge_l: Interval
    """F-measure against the dense model's text: 1 where both wrote the same."""
    same: Interval
    """Fraction of prompts with exactly the same text."""
    repetition_change: Interval
    tokens_change: Interval
    followed_change: Interval | None
    pairs: tuple[GenerationPair, ...]
