"""`robustness:` what models lose when prompts and texts are disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from typing_extensions import override

from llmcompress.evaluation.settings.base import METRIC_SETTINGS, EvaluatedTokens, LocalSource, MetricSettings
from llmcompress.evaluation.settings.tasks import LONGEST_PROMPT, TASK_FILES

_TEXTS = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".xz", ".gz")


@METRIC_SETTINGS.register("robustness")
class RobustnessSettings(MetricSettings):
    """A task or a text that both models also see disturbed."""

    task: str | None = None
    """As in `tasks`; its prompts are disturbed, not the answers to choose from."""
    text: str | None = None
    """As `source` in `perplexity`, instead of a task."""
    data: str | None = None
    """As in `tasks`."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first documents of every task, or windows of a text (there None: 32)."""
    noise: tuple[Annotated[float, Field(gt=0, le=0.2)], ...] = (0.05,)
    """Rates of typing errors per letter: each rate is one disturbance."""
    prompts: tuple[str, ...] | None = None
    """Names of other forms of the prompt (`evals/prompts/paraphrases.yaml`); None: all; of a text there are none."""
    seed: int = 0
    """Of the typing errors."""

    @model_validator(mode="after")
    def _one_subject(self) -> Self:
        if (self.task is None) == (self.text is None):
            raise ValueError("give either `task` or `text`")
        return self

    @override
    def sources(self) -> Iterator[LocalSource]:
        named = self.text or (self.task if self.task and self.task.endswith(TASK_FILES) else None)
        if named:
            yield LocalSource(named, "evaluate.robustness")

    @override
    def evaluated_tokens(self, max_positions: int | None) -> Iterator[EvaluatedTokens]:
        yield EvaluatedTokens(min(max_positions or LONGEST_PROMPT, LONGEST_PROMPT), None)

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        """A text (`builtin:evaluation`, `book.txt`), or a task."""
        return {"text": text} if text.startswith("builtin:") or text.endswith(_TEXTS) else {"task": text}
