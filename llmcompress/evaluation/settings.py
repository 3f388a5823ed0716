"""The settings under `evaluate:` in a recipe."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmcompress.registry import Registry

_WITH_SPLIT = re.compile(r"(?!builtin:)(?P<source>.+):(?P<split>[A-Za-z][\w-]*(\[[^]]*\])?)")

LONGEST_DEFAULT_WINDOW = 2048

DEFAULT_TOKENS = 16_384
"""Measured of a text where nothing else is asked for, dense and compressed alike: docs/decisions/0029."""

TASKS: Registry[PerplexityTask] = Registry("measurement", "llmcompress.evaluation.settings")
"""Name of a metric → its settings in a recipe."""


@TASKS.register("perplexity")
class PerplexityTask(BaseModel):
    """A text on which the dense and the compressed model are evaluated."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: str = Field(min_length=1)
    """`builtin:evaluation`, a local .txt/.jsonl/.parquet/.csv, or a Hub dataset id."""
    split: str = Field(default="test", min_length=1)
    """Split of a Hub dataset."""
    config: str | None = None
    """Configuration of a Hub dataset (`wikitext-2-raw-v1`)."""
    column: str | None = None
    """The column with the text; None: found by its usual names."""
    window: int | None = Field(default=None, ge=2)
    """Tokens per window, BOS included; None: the model's limit, at most 2048."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether every window starts with the BOS token; `auto`: as the tokenizer does."""
    max_windows: Annotated[int, Field(ge=1)] | Literal["all"] | None = None
    """Evaluate only the first windows; None: as many as 16,384 tokens fill; `all`: the whole text."""

    def window_for(self, max_positions: int | None) -> int:
        """Tokens in a window of a model of so many positions (None: no limit)."""
        wanted = LONGEST_DEFAULT_WINDOW if self.window is None else self.window
        return min(max_positions or wanted, wanted)

    def most_windows(self, window: int) -> int | None:
        """How many windows of that length are measured, where the text has so many; None: all."""
        if self.max_windows == "all":
            return None
        return max(1, DEFAULT_TOKENS // window) if self.max_windows is None else self.max_windows

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        """Source, or source:split: `builtin:evaluation`, `file.txt`, `wikitext2`, `wikitext2:validation`."""
        found = _WITH_SPLIT.fullmatch(text)
        return {"source": found["source"], "split": found["split"]} if found else {"source": text}


BUNDLED_TEXT = (PerplexityTask(source="builtin:evaluation"),)
"""The default evaluation."""
