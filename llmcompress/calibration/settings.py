"""What `calibration:` in a recipe may say."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Experts = Literal["routed", "all"]


class Calibration(BaseModel):
    """The text whose activations the passes measure."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: str = Field(default="builtin:calibration", min_length=1)
    """`builtin:calibration`, `self` (sampled from the model), a .txt/.jsonl/.parquet/.csv, or a Hub dataset id."""
    split: str = Field(default="train", min_length=1)
    """Which split of a Hub dataset."""
    config: str | None = None
    """Which configuration of a Hub dataset (`wikitext-2-raw-v1`)."""
    column: str | None = None
    """The column that holds the text or the messages; None: found by its usual names."""
    format: Literal["auto", "text", "chat"] = "auto"
    """Whether rows are plain text or lists of messages."""
    chat_template: str | None = None
    """A file with the Jinja chat template to use where the tokenizer has none."""
    samples: int = Field(default=128, ge=1)
    """How many windows."""
    tokens: int = Field(default=512, ge=2)
    """Tokens in a window; every window is full."""
    batch: int = Field(default=8, ge=1)
    """Windows that go through a block together."""
    experts: Experts = "routed"
    """Which tokens an expert is measured on: those that the router sends it, or all of them (several times slower)."""
    min_tokens: int = Field(default=10, ge=1)
    """Rows with fewer tokens are left out."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read, and count them, instead of stopping."""


class Guard(BaseModel):
    """Windows of the calibration text that no pass measures: what the passes leave is checked on them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    windows: int = Field(default=1, ge=0, le=64)
    """How many; 0: nothing is checked."""
    fall_back: bool = True
    """Whether a block that its passes left worse than plain rounding or magnitude pruning is replaced by that."""
