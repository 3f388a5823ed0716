"""The settings of tasks in a recipe; needs neither torch nor lm-eval."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class TaskSettings(BaseModel):
    """Tasks of lm-eval that the dense and the compressed model answer."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tasks: tuple[str, ...] = Field(default=("builtin_word_order",), min_length=1)
    """Names of lm-eval (`arc_easy`), bundled ones (`local_arc_easy`, `builtin_word_order`), or task files."""
    data: str | None = None
    """The folder with the data of task files; None: beside the task file."""
    limit: int | None = Field(default=None, ge=1)
    """Only the first documents of each task; None: all."""
    shots: int | None = Field(default=None, ge=0)
    """Solved examples in the prompt; None: as the task says."""
    chat_template: bool = False
    """Whether prompts are written with the tokenizer's chat template."""
