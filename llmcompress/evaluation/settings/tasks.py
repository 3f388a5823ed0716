"""`tasks:` what lm-eval asks the models: its own tasks, bundled ones, and task files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from pydantic import Field
from typing_extensions import override

from llmcompress.evaluation.settings.base import METRIC_SETTINGS, EvaluatedTokens, LocalSource, MetricSettings

TASK_FILES = (".yaml", ".yml")
LONGEST_PROMPT = 512
"""Tokens: a guess, for estimates of time alone."""


@METRIC_SETTINGS.register("tasks")
class TaskSettings(MetricSettings):
    """A task that the dense and the compressed model answer."""

    task: str = Field(min_length=1)
    """A task, group or tag of lm-eval (`arc_easy`), a bundled one (`local_arc_easy`), or a task file."""
    data: str | None = None
    """The folder with the data of a bundled task or a task file; None: beside the task file."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first documents (of every task of a group); None: all."""
    shots: int | None = Field(default=None, ge=0)
    """Solved examples in the prompt; None: as the task says."""
    chat_template: bool = False
    """Whether prompts are written with the tokenizer's chat template."""

    @property
    def name(self) -> str:
        """What reports call it: of a file its name, never its folder."""
        return PurePath(self.task).stem if self.task.endswith(TASK_FILES) else self.task

    @override
    def sources(self) -> Iterator[LocalSource]:
        if self.task.endswith(TASK_FILES):
            yield LocalSource(self.task, "evaluate.tasks")

    @override
    def evaluated_tokens(self, max_positions: int | None) -> Iterator[EvaluatedTokens]:
        yield EvaluatedTokens(min(max_positions or LONGEST_PROMPT, LONGEST_PROMPT), None)

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        """The task alone."""
        return {"task": text}
