"""`filter_perplexity`: drops rows that a model finds too unlikely, or too likely."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field
from typing_extensions import override

from llmcompress.elicitation.base import STEPS, Row, Tools, part_of, text_of
from llmcompress.elicitation.steps.judging import Judging


@STEPS.register("filter_perplexity")
class FilterPerplexity(Judging):
    """A row stays if the perplexity of its response (of its text, where there is no prompt) lies within the limits.

    It is noted in the column `perplexity`.

    Source: Marion et al., arXiv 2309.04564, section 3.1 (perplexity as a pruning metric).
    """

    by: str = Field(default="original", min_length=1)
    """Whose perplexity: `original`, a Hub id or a folder."""
    lowest: float = Field(default=1.0, ge=1)
    """Below it, text is repetition."""
    highest: float = Field(default=100.0, gt=1)
    """Above it, text is noise."""

    @override
    def unit(self, number: int, given: Sequence[Row], made: Sequence[Row], tools: Tools) -> list[Row]:
        rows = part_of(given, number, self.batch)
        prompts = [str(row["prompt"]) if "prompt" in row else "" for row in rows]
        column = ["response" if "prompt" in row else "text" for row in rows]
        texts = [text_of(row, name, step="filter_perplexity") for row, name in zip(rows, column, strict=True)]
        found = [math.exp(min(loss, 700.0)) for loss in tools.author(self.by).losses(prompts, texts)]
        judged = zip(rows, found, strict=True)
        return [{**row, "perplexity": each} for row, each in judged if self.lowest <= each <= self.highest]
