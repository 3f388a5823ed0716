"""`filter_similar`: drops rows that resemble an earlier one."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from typing_extensions import override

from llmcompress.elicitation.base import STEPS, DataStep, Row, Tools, text_of
from llmcompress.evaluation.generations.statistics import require_rouge, rouge_l


@STEPS.register("filter_similar")
class FilterSimilar(DataStep):
    """A row stays if its ROUGE-L with every row kept before it is below the limit.

    Source: Wang et al., arXiv 2212.10560, section 2.2 (Self-Instruct).
    """

    column: str = "prompt"
    """The column that is compared."""
    similarity: float = Field(default=0.7, gt=0, le=1)
    """ROUGE-L (F-measure) from which on a row is dropped."""

    @override
    def check(self) -> None:
        require_rouge()

    @override
    def units(self, given: Sequence[Row]) -> int:
        return len(given)

    @override
    def unit(self, number: int, given: Sequence[Row], made: Sequence[Row], tools: Tools) -> list[Row]:
        text = text_of(given[number], self.column, step="filter_similar")
        others = [text_of(row, self.column, step="filter_similar") for row in made]
        near = max(rouge_l(others, [text] * len(others)), default=0.0)
        return [given[number]] if near < self.similarity else []
