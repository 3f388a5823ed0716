"""`prompts`: prompts that are written in the recipe."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from typing_extensions import override

from llmcompress.elicitation.base import STEPS, DataStep, Row, Tools


@STEPS.register("prompts")
class Prompts(DataStep):
    """One row for every prompt, added to the rows before."""

    texts: tuple[str, ...] = Field(min_length=1)
    """The prompts."""

    @override
    def units(self, given: Sequence[Row]) -> int:
        return 1

    @override
    def unit(self, number: int, given: Sequence[Row], made: Sequence[Row], tools: Tools) -> list[Row]:
        return [*given, *({"prompt": text} for text in self.texts)]
