"""`gate:` how much worse than the dense model a result may be."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from llmcompress.evaluation.settings.base import METRIC_SETTINGS, MetricSettings


@METRIC_SETTINGS.register("gate")
class Gate(MetricSettings):
    """Limits of the quality gate. A result beyond one of them is saved, not published, and the exit code is 6.

    Estimates are compared, not the ends of their intervals; of several texts or tasks the worst counts.
    """

    only_one: ClassVar[bool] = True

    perplexity_ratio: float | None = Field(default=None, gt=0)
    """Compressed ÷ dense perplexity, at most."""
    kl_mean: float | None = Field(default=None, ge=0)
    """Mean KL(dense ‖ compressed) in nats per token, at most."""
    flips: float | None = Field(default=None, ge=0, le=1)
    """Fraction of answers that change between right and wrong, at most; without tasks, of next-token predictions."""
    repetition: float | None = Field(default=None, ge=0, le=1)
    """Fraction of the generated texts' 4-grams that stood in the text before, at most."""
    finite: Literal[True] | None = None
    """Every number that the compressed model computes is finite; otherwise a NaN is an error that ends the run."""
