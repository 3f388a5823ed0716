"""`filter_difficulty`: keeps the rows whose prompt helps least to predict the response, but does help."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field
from typing_extensions import override

from llmcompress.elicitation.base import STEPS, Row, Tools, part_of, text_of
from llmcompress.elicitation.steps.judging import Judging


@STEPS.register("filter_difficulty")
class FilterDifficulty(Judging):
    """Instruction-following difficulty: loss of the response after its prompt ÷ loss of the response alone.

    Above 1 the prompt misleads, and the row is dropped. Of the others, the fraction with the highest difficulty stays,
    in their order. It is noted in the column `difficulty`.

    Source: Li et al., arXiv 2308.12032, section 2.3 (IFD; the paper keeps 5 to 15 %).
    """

    by: str = Field(default="original", min_length=1)
    """Who finds it difficult, usually the student: `original`, a Hub id or a folder."""
    fraction: float = Field(default=0.1, gt=0, le=1)
    """Fraction of the rows that stays."""
    highest: float = Field(default=1.0, gt=0)
    """Difficulty from which on a row is dropped."""

    @override
    def unit(self, number: int, given: Sequence[Row], made: Sequence[Row], tools: Tools) -> list[Row]:
        rows, author = part_of(given, number, self.batch), tools.author(self.by)
        prompts, responses = (
            [text_of(row, name, step="filter_difficulty") for row in rows] for name in ("prompt", "response")
        )
        after, alone = author.losses(prompts, responses), author.losses([""] * len(rows), responses)
        ratios = [one / other if other else math.inf for one, other in zip(after, alone, strict=True)]
        # JSON has no infinity
        return [{**row, "difficulty": min(ratio, 1e9)} for row, ratio in zip(rows, ratios, strict=True)]

    @override
    def finished(self, made: Sequence[Row]) -> list[Row]:
        fitting = [index for index, row in enumerate(made) if float(row["difficulty"]) < self.highest]
        fitting.sort(key=lambda index: -float(made[index]["difficulty"]))
        return [made[index] for index in sorted(fitting[: math.ceil(self.fraction * len(made))])]
