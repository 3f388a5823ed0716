"""The settings under `calibration:` in a recipe."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field

from llmcompress.calibration.devices import multiplies_in_bfloat16

Experts = Literal["routed", "all"]


class Calibration(BaseModel):
    """The calibration text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: str = Field(default="builtin:calibration", min_length=1)
    """`builtin:calibration`, `self` (sampled from the model), a .txt/.jsonl/.parquet/.csv, or a Hub dataset id.
    `memory:…` names data that were handed over in Python."""
    split: str = Field(default="train", min_length=1)
    """Split of a Hub dataset."""
    config: str | None = None
    """Configuration of a Hub dataset (`wikitext-2-raw-v1`)."""
    column: str | None = None
    """The column with the text or the messages; None: found by its usual names."""
    format: Literal["auto", "text", "chat"] = "auto"
    """Whether rows are plain text or lists of messages."""
    chat_template: str | None = None
    """A Jinja chat template file, for tokenizers that have none."""
    samples: int = Field(default=128, ge=1)
    """Number of windows."""
    tokens: int = Field(default=512, ge=2)
    """Tokens per window; every window is full."""
    batch: int = Field(default=8, ge=1)
    """Batch size: windows that pass through a block together."""
    mixed_precision: Literal["bf16", "auto"] | None = None
    """Multiply in bfloat16 while the text runs through a block: several times as fast on GPUs, and on CPUs with
    instructions for it (`avx512_bf16`, `amx_bf16`), slower on others. Weights, statistics, solvers and hidden states
    between blocks stay float32. None: float32. `auto`: bfloat16 where the device has instructions for it."""
    experts: Experts = "routed"
    """Tokens on which an expert is measured: those routed to it, or all of them (several times slower)."""
    min_tokens: int = Field(default=10, ge=1)
    """Rows with fewer tokens are skipped."""
    skip_bad_rows: bool = False
    """Skip and count rows that cannot be read, instead of stopping."""

    def settled(self, device: torch.device) -> Self:
        """With what `auto` means on this device, so that what is recorded can be repeated anywhere."""
        if self.mixed_precision != "auto":
            return self
        return self.model_copy(update={"mixed_precision": "bf16" if multiplies_in_bfloat16(device) else None})

    def of_blocks(self, device: torch.device) -> dict[str, Any]:
        """How data run through blocks on `device`: fields of the run's context."""
        precision = self.settled(device).mixed_precision
        return {"batch": self.batch, "mixed_precision": precision, "experts": self.experts}


class Guard(BaseModel):
    """Windows of the calibration text that no pass measures: what the passes leave is checked on them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    windows: int = Field(default=1, ge=0, le=64)
    """How many; 0: nothing is checked."""
    fall_back: bool = True
    """Whether a block that its passes left worse than plain rounding or magnitude pruning is replaced by that."""
