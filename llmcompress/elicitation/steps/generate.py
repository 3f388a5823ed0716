"""`generate`: text that a model writes from nothing, for training without data."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from typing_extensions import override

from llmcompress.elicitation.base import STEPS, Row, Tools, units_of
from llmcompress.elicitation.steps.answering import Writing


@STEPS.register("generate")
class Generate(Writing):
    """Texts that begin with BOS alone, or with `prompt`, added to the rows before.

    Source: Kim and Rush, arXiv 1606.07947 (sequence-level distillation: the student learns what the teacher writes);
    Liu et al., arXiv 2305.17888, section 3.1 (LLM-QAT: text of the model itself keeps its distribution).
    """

    count: int = Field(default=64, ge=1)
    """Texts."""
    prompt: str = ""
    """What every text begins with; it is part of it."""
    temperature: float = Field(default=1.0, ge=0)
    """Of the drawing; 1: the model's own distribution."""

    @override
    def units(self, given: Sequence[Row]) -> int:
        return units_of(self.count, self.batch)

    @override
    def unit(self, number: int, given: Sequence[Row], made: Sequence[Row], tools: Tools) -> list[Row]:
        count = min(self.batch, self.count - number * self.batch)
        texts = tools.author(self.by).continued([self.prompt] * count, self.drawing(tools))
        before = [] if number else list(given)
        return [*before, *({"text": self.prompt + text} for text in texts if text.strip())]
