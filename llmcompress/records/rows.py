"""The report row of one pass at one site, as returned by passes, kept in journals and listed in reports."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Which = Literal["model", "dense", "compressed"]
"""Before or after compression; `model` if only one model was measured."""


class Record(BaseModel):
    """Frozen data that is written as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SiteReport(Record):
    """What one pass did to one site."""

    site: str
    algorithm: str
    scheme: str | None = None
    bits_per_weight: float | None = None
    """Stored bits of codes, scales and zero points ÷ number of weights."""
    error: float | None = None
    """Squared error of the site's output on calibration inputs ÷ squared output; None without data."""
    error_before: float | None = None
    """The same for the pass's baseline (such as rounding to nearest), if it has one."""
    tokens: int | None = None
    """Calibration tokens that reached the site."""
    sparsity: float | None = None
    """Sparsity: fraction of weights that are exactly zero afterwards."""
    rank: int | None = None
    """Rank of a low-rank site."""
    parameters: int | None = None
    """Parameters of the site (or block) afterwards."""
    removed: int | None = None
    """Removed units, channels or blocks."""
    score: float | None = None
    """The score behind the decision, in the algorithm's own unit."""
    active: float | None = None
    """Fraction of calibration tokens for which the block ran, or of inputs with which the site computed."""
    cache_bytes: int | None = None
    """Bytes of one token's keys and values in that attention's KV cache afterwards."""
    cache_bytes_before: int | None = None
    """The same in the model's stored dtype."""
    degraded: str | None = None
    """Why a fallback was used (`damping raised to 0.1`, `no tokens: rounded to nearest`)."""
