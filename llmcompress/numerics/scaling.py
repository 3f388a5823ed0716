"""Which channels to divide before a linear and multiply inside it. C = consumer channels, P = producer channels.

A fold feeds consumer channel c from producer channel `channel_map[c]`; several consumer channels share a producer
channel where key-value heads are shared, and then share one factor. O = outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.numerics.grid import output_error

SMALLEST = 1e-5
"""Channels quieter than this are treated as this quiet, so that no factor is zero or infinite."""


def smoothing_factors(
    input_max_C: Tensor, weight_max_C: Tensor, channel_map_C: Tensor, producers: int, *, strength: float
) -> Tensor:
    """SmoothQuant's max|x|^strength / max|w|^(1-strength) per producer channel; 1 for channels that feed nobody.

    Source: Xiao et al., arXiv 2211.10438, eq. 4.
    """
    input_max_P = reduce_max(input_max_C, channel_map_C, producers).clamp_min(SMALLEST)
    weight_max_P = reduce_max(weight_max_C, channel_map_C, producers).clamp_min(SMALLEST)
    factors_P = input_max_P.pow(strength) / weight_max_P.pow(1 - strength)
    return torch.where(_feeds_somebody(channel_map_C, producers), factors_P.clamp_min(SMALLEST), 1.0)


@dataclass(frozen=True)
class ScaleSearch:
    """The best factors found, the error with them and with none (both of the rounded consumers' outputs)."""

    factors_P: Tensor
    exponent: float
    error: float
    error_unscaled: float


def search_factors(
    weights_OC: Sequence[Tensor],
    rounders: Sequence[Callable[[Tensor], Tensor]],
    gram_CC: Tensor,
    salience_C: Tensor,
    channel_map_C: Tensor,
    producers: int,
    *,
    points: int,
) -> ScaleSearch:
    """AWQ: factors = salience^r, r in 0 … 1, that least disturb the outputs of the linears reading the channels.

    `rounders` map a weight to its rounded self, one per weight. r = 0 leaves everything as it is, so the result is
    never worse than plain rounding on the calibration data.

    Source: Lin et al., arXiv 2306.00978, section 3.2. Differs: the error is that of the consumers' own outputs,
    which the Gram matrix gives exactly without a forward pass, not that of the enclosing attention or MLP.
    """
    salience_P = reduce_mean(salience_C, channel_map_C, producers).clamp_min(1e-4)
    feeds_P = _feeds_somebody(channel_map_C, producers)
    best: ScaleSearch | None = None
    unscaled = 0.0
    for point in range(points):
        exponent = point / points
        factors_P = salience_P.pow(exponent)
        fed_P = factors_P[feeds_P]
        factors_P = torch.where(feeds_P, factors_P / (fed_P.max() * fed_P.min()).sqrt(), 1.0)
        factors_C = factors_P[channel_map_C]
        error = 0.0
        for weight_OC, rounded in zip(weights_OC, rounders, strict=True):
            error += float(output_error(rounded(weight_OC * factors_C) / factors_C - weight_OC, gram_CC))
        if point == 0:
            unscaled = error
        if best is None or error < best.error:
            best = ScaleSearch(factors_P, exponent, error, unscaled)
    assert best is not None, "a search needs at least one point"
    return best


def reduce_max(values_C: Tensor, channel_map_C: Tensor, producers: int) -> Tensor:
    """Largest value among the consumer channels of each producer channel; 0 where there is none."""
    return values_C.new_zeros(producers).scatter_reduce(0, channel_map_C, values_C, "amax", include_self=True)


def reduce_mean(values_C: Tensor, channel_map_C: Tensor, producers: int) -> Tensor:
    """Mean value among the consumer channels of each producer channel; 0 where there is none."""
    return values_C.new_zeros(producers).scatter_reduce(0, channel_map_C, values_C, "mean", include_self=False)


def _feeds_somebody(channel_map_C: Tensor, producers: int) -> Tensor:
    fed_P = torch.zeros(producers, dtype=torch.bool, device=channel_map_C.device)
    fed_P[channel_map_C] = True
    return fed_P
