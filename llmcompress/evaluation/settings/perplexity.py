"""`perplexity:` a text on which models are evaluated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import override

from llmcompress.calibration.sources import bytes_of_text
from llmcompress.evaluation.settings.base import METRIC_SETTINGS, EvaluatedTokens, LocalSource, MetricSettings

_WITH_SPLIT = re.compile(r"(?!builtin:)(?P<source>.+):(?P<split>[A-Za-z][\w-]*(\[[^]]*\])?)")

LONGEST_DEFAULT_WINDOW = 2048

DEFAULT_TOKENS = 16_384
"""Measured of a text where nothing else is asked for, dense and compressed alike: docs/decisions/0029."""

BYTES_PER_TOKEN = 4.0
"""Of ordinary text: a guess, for estimates of time alone."""


@METRIC_SETTINGS.register("perplexity")
class PerplexityTask(MetricSettings):
    """A text on which the dense and the compressed model are evaluated."""

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

    @override
    def sources(self) -> Iterator[LocalSource]:
        yield LocalSource(self.source, f"evaluate.perplexity: {self.source}")

    @override
    def evaluated_tokens(self, max_positions: int | None) -> Iterator[EvaluatedTokens]:
        window = self.window_for(max_positions)
        size, most = bytes_of_text(self.source), self.most_windows(window)
        known = [size / BYTES_PER_TOKEN] if size is not None else []
        bounded = [float(most * window)] if most is not None else []
        yield EvaluatedTokens(window, min([*known, *bounded], default=None))

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        """Source, or source:split: `builtin:evaluation`, `file.txt`, `wikitext2`, `wikitext2:validation`."""
        found = _WITH_SPLIT.fullmatch(text)
        return {"source": found["source"], "split": found["split"]} if found else {"source": text}


BUNDLED_TEXT = (PerplexityTask(source="builtin:evaluation"),)
"""The default evaluation."""
