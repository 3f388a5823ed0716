"""The report row of one pass at one site, as returned by passes, kept in journals and listed in reports."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


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
    """The same for the pass's baseline (plain rounding), where the pass compares with one."""
    tokens: int | None = None
    """Calibration tokens that reached the site."""
    sparsity: float | None = None
    """Share of weights that are exactly zero afterwards."""
    rank: int | None = None
    """Of a low-rank site."""
    parameters: int | None = None
    """Of the site (or block) afterwards."""
    removed: int | None = None
    """Units, channels or blocks that were removed there."""
    score: float | None = None
    """What the decision was made on, in the algorithm's own unit."""
    active: float | None = None
    """Share of calibration tokens that the block ran for, or of inputs that the site computed with."""
    cache_bytes: int | None = None
    """Of the keys and values of one token in that attention's cache afterwards."""
    cache_bytes_before: int | None = None
    """The same in the type that the model is stored in."""
    degraded: str | None = None
    """Why a fallback was used (`damping raised to 0.1`, `no tokens: rounded to nearest`)."""
