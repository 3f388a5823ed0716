"""The evidence of a run: what was done to every site, quality before and after, bytes, seconds, environment."""

from __future__ import annotations

from llmcompress.records.rows import Record, SiteReport


class PerplexityResult(Record):
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


class Quality(Record):
    """The same measurement on the dense and on the compressed model."""

    dense: PerplexityResult
    compressed: PerplexityResult

    @property
    def ratio(self) -> float:
        """Compressed ÷ dense perplexity."""
        return self.compressed.perplexity / self.dense.perplexity


class Report(Record):
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
