"""Smoothing factors: which channels to divide before a linear and multiply in it. C = consumer channels, P = producer
channels.

A fold feeds consumer channel c from producer channel `channel_map[c]`; several consumer channels share a producer
channel where key-value heads are shared, and then share one factor. O = outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.numerics.grid import row_errors

SMALLEST = 1e-5
"""Channels quieter than this are treated as this quiet, so that no factor is zero or infinite."""


def smoothing_factors(
    input_max_C: Tensor, weight_max_C: Tensor, channel_map_C: Tensor, producers: int, *, strength: float
) -> Tensor:
    """SmoothQuant's max|x|^strength / max|w|^(1-strength) per producer channel; 1 for channels that are not read.

    Source: Xiao et al., arXiv 2211.10438, eq. 4.
    """
    input_max_P = reduce_max(input_max_C, channel_map_C, producers).clamp_min(SMALLEST)
    weight_max_P = reduce_max(weight_max_C, channel_map_C, producers).clamp_min(SMALLEST)
    factors_P = input_max_P.pow(strength) / weight_max_P.pow(1 - strength)
    return torch.where(_is_read(channel_map_C, producers), factors_P.clamp_min(SMALLEST), 1.0)


@dataclass(frozen=True)
class ScaleSearch:
    """The best factors found, the error with them and with none (both of the rounded consumers' outputs)."""

    factors_P: Tensor
    exponent: float
    error: float
    error_unscaled: float


def search_factors(
    consumers: Sequence[tuple[Tensor, Callable[[Tensor], Tensor]]],
    gram_CC: Tensor,
    salience_C: Tensor,
    channel_map_C: Tensor,
    producers: int,
    *,
    points: int,
    unscaled: float | None = None,
) -> ScaleSearch:
    """AWQ: factors = salience^r that least disturb the outputs of the linears reading the channels.

    r is a multiple of 1 ÷ `points` below 1.

    A consumer is a weight_OC and what maps it to its rounded self. The search looks at some rows of every weight; what
    it finds must beat r = 0, which leaves everything as it is, on all of them (`unscaled`: that error, where known).

    Source: Lin et al., arXiv 2306.00978, section 3.2. Differs: the error is that of the consumers' own outputs,
    which the Gram matrix gives exactly without a forward pass, not that of the enclosing attention or MLP.
    """
    salience_P = reduce_mean(salience_C, channel_map_C, producers).clamp_min(1e-4)
    read_P = _is_read(channel_map_C, producers)
    assert points, "a search needs at least one point"

    def errors_with(
        tried: Sequence[Tensor], looked_at: Sequence[tuple[Tensor, Callable[[Tensor], Tensor]]]
    ) -> list[float]:
        total_F = torch.zeros(len(tried), dtype=torch.float64)
        for w_OC, rounded in looked_at:
            # all factors in one product: a few rows alone would not make a fast one
            differences = [rounded(w_OC * factors_C) / factors_C - w_OC for factors_C in tried]
            errors_FO = row_errors(torch.cat(differences), gram_CC).view(len(tried), -1)
            total_F += errors_FO.sum(1, dtype=torch.float64).cpu()
        return [float(total) for total in total_F]

    def factors_of(exponent: float) -> Tensor:
        factors_P = salience_P.pow(exponent)
        fed_P = factors_P[read_P]
        return torch.where(read_P, factors_P / (fed_P.max() * fed_P.min()).sqrt(), 1.0)

    some = [(weight_OC[:: -(-len(weight_OC) // ROWS)], rounded) for weight_OC, rounded in consumers]
    errors: dict[int, float] = {}

    def least(tried: Sequence[int]) -> int:
        if not tried:
            return min(errors, key=errors.__getitem__)
        found = errors_with([factors_of(point / points)[channel_map_C] for point in tried], some)
        errors.update(zip(tried, found, strict=True))
        return min(errors, key=errors.__getitem__)

    # the error changes slowly with the exponent: every other one first, then the two beside the best
    around = least(range(0, points, 2))
    best = least([point for point in (around - 1, around + 1) if 0 < point < points]) / points
    none_P = factors_of(0.0)
    if unscaled is None:
        (unscaled,) = errors_with([none_P[channel_map_C]], consumers)
    error = errors_with([factors_of(best)[channel_map_C]], consumers)[0] if best > 0 else unscaled
    if error < unscaled:
        return ScaleSearch(factors_of(best), best, error, unscaled)
    return ScaleSearch(none_P, 0.0, unscaled, unscaled)


ROWS = 128
"""Of every weight, evenly spaced: enough to tell exponents apart, and a few per cent of all in a large model."""


def reduce_max(values_C: Tensor, channel_map_C: Tensor, producers: int) -> Tensor:
    """Largest value among the consumer channels of each producer channel; 0 where there is none."""
    return values_C.new_zeros(producers).scatter_reduce(0, channel_map_C, values_C, "amax", include_self=True)


def reduce_mean(values_C: Tensor, channel_map_C: Tensor, producers: int) -> Tensor:
    """Mean value among the consumer channels of each producer channel; 0 where there is none."""
    return values_C.new_zeros(producers).scatter_reduce(0, channel_map_C, values_C, "mean", include_self=False)


def _is_read(channel_map_C: Tensor, producers: int) -> Tensor:
    fed_P = torch.zeros(producers, dtype=torch.bool, device=channel_map_C.device)
    fed_P[channel_map_C] = True
    return fed_P
