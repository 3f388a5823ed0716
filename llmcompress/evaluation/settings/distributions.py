"""`distributions:` histograms of the weights and of the inputs of linears, for the report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field
from typing_extensions import override

from llmcompress.evaluation.settings.base import METRIC_SETTINGS, EvaluatedTokens, MetricSettings


@METRIC_SETTINGS.register("distributions")
class Distributions(MetricSettings):
    """Weights and input activations of linears, before and after, on one window of the bundled text."""

    only_one: ClassVar[bool] = True

    tokens: int = Field(default=256, ge=2)
    """Tokens that the model is run on for the activations."""

    @override
    def evaluated_tokens(self, max_positions: int | None) -> Iterator[EvaluatedTokens]:
        window = min(self.tokens, max_positions or self.tokens)
        yield EvaluatedTokens(window, float(window))
