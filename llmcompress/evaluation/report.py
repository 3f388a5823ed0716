"""The evidence of a run: what was done to every site, quality before and after, bytes, seconds, environment."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SiteReport(_Row):
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


class PerplexityResult(_Row):
    """Perplexity with everything needed to repeat it."""

    text: str
    """Where the text came from (`builtin:evaluation`, `wikitext:test`)."""
    window: int
    """Tokens per non-overlapping window, the BOS included."""
    bos: bool
    """Whether every window starts with the BOS token (which is never predicted)."""
    tokens: int
    """Tokens predicted."""
    perplexity: float
    bits_per_byte: float


class Quality(_Row):
    """The same measurement on the dense and on the compressed model."""

    dense: PerplexityResult
    compressed: PerplexityResult

    @property
    def ratio(self) -> float:
        """Compressed ÷ dense perplexity."""
        return self.compressed.perplexity / self.dense.perplexity


class Report(_Row):
    """Saved as `llmcompress_report.json` beside the weights."""

    model: str
    recipe_hash: str
    versions: dict[str, str]
    machine: dict[str, str]
    calibration_tokens: int
    sites: tuple[SiteReport, ...]
    refused: dict[str, str]
    quality: tuple[Quality, ...]
    bytes_dense: int
    """Bytes of the weight files that were read."""
    bytes_compressed: int
    """Bytes of the weight files that were written."""
    seconds: dict[str, float]
    """Wall seconds by stage."""
    warnings: tuple[str, ...] = ()

    @property
    def degraded(self) -> tuple[SiteReport, ...]:
        """Sites where a fallback was used."""
        return tuple(row for row in self.sites if row.degraded)
