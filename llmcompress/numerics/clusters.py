"""Clusters channels with similar ranges, so that each cluster has its own grid. I = channels, K = clusters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.numerics.fake_quant import passing
from llmcompress.numerics.statistics import Statistic

_ROUNDS = 20
"""Of Lloyd's algorithm after every split; it has settled before."""


class Range(Statistic):
    """Smallest and largest value of every channel."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        super().__init__(inputs, device)
        self._low_I = torch.full((inputs,), torch.inf, dtype=torch.float32, device=device)
        self._high_I = torch.full((inputs,), -torch.inf, dtype=torch.float32, device=device)

    @property
    def low_I(self) -> Tensor:
        """Zeros when no token was seen."""
        return self._low_I if self.tokens else torch.zeros_like(self._low_I)

    @property
    def high_I(self) -> Tensor:
        """Zeros when no token was seen."""
        return self._high_I if self.tokens else torch.zeros_like(self._high_I)

    @override
    def add(self, x_TI: Tensor) -> None:
        self.tokens += len(x_TI)
        if len(x_TI):
            torch.minimum(self._low_I, x_TI.amin(0), out=self._low_I)
            torch.maximum(self._high_I, x_TI.amax(0), out=self._high_I)

    @override
    def rescale(self, divide_I: Tensor) -> None:
        self._low_I.div_(divide_I)
        self._high_I.div_(divide_I)

    @override
    def is_finite(self) -> bool:
        return not self.tokens or bool((torch.isfinite(self._low_I) & torch.isfinite(self._high_I)).all())


@dataclass(frozen=True)
class Clusters:
    """Which cluster every channel belongs to, and the ranges that the clusters cover."""

    member_I: Tensor
    low_K: Tensor
    high_K: Tensor

    @property
    def order_I(self) -> Tensor:
        """Channels cluster by cluster, in their old order inside each."""
        return self.member_I.argsort(stable=True)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Channels of every cluster."""
        return tuple(torch.bincount(self.member_I, minlength=len(self.low_K)).tolist())

    @property
    def cost(self) -> float:
        """Σ over channels of the squared width of their cluster's range: what rounding errors grow with."""
        width_K = (self.high_K - self.low_K).double()
        return float(width_K.square()[self.member_I].sum())


def cluster(low_I: Tensor, high_I: Tensor, count: int) -> Clusters:
    """At most `count` clusters of channels with like (low, high): k-means, grown one cluster at a time.

    The split that saves most is made and Lloyd's algorithm moves channels on; where that costs more than the split
    alone, the split alone stays. So more clusters never cost more, and no random start decides anything.

    Source: Yuan et al. (RPTQ), arXiv 2304.01089. Differs: grown instead of ten random starts.
    """
    points_I2 = torch.stack([low_I, high_I], 1).double()
    member_I = torch.zeros(len(points_I2), dtype=torch.int64, device=low_I.device)
    best = _covering(points_I2, member_I)
    while len(best.low_K) < count:
        split = _split(points_I2, best)
        if split is None:
            break
        moved = _covering(points_I2, _lloyd(points_I2, split.member_I))
        best = min(split, moved, key=lambda clusters: clusters.cost)
    return best


def grid_of(clusters: Clusters, bits: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales, in values of `scale_dtype`, and whole zero points (int32): x ≈ scale · (code - zero), codes from 0 on."""
    span_K = (clusters.high_K - clusters.low_K) / (2**bits - 1)
    # a channel that is always the same needs a grid too: one step is its value
    span_K = torch.where(span_K > 0, span_K, clusters.high_K.abs())
    scale_K = span_K.float().to(scale_dtype).float()
    safe_K = torch.where(scale_K > 0, scale_K, torch.ones_like(scale_K))
    return scale_K, (-clusters.low_K.float() / safe_K).round().to(torch.int32)


def round_by_clusters(x: Tensor, scale_I: Tensor, zero_I: Tensor, bits: int) -> Tensor:
    """Every channel to its own grid and back; one with scale 0 is left as it is. Gradients pass unchanged."""
    return passing(lambda exact: _rounded(exact, scale_I, zero_I, bits), x)


def _rounded(x: Tensor, scale_I: Tensor, zero_I: Tensor, bits: int) -> Tensor:
    safe_I = torch.where(scale_I > 0, scale_I, torch.ones_like(scale_I)).float()
    codes = (x.float() / safe_I).round_().add_(zero_I).clamp_(0, 2**bits - 1)
    return torch.where(scale_I > 0, codes.sub_(zero_I).mul_(safe_I).to(x.dtype), x)


def _covering(points_I2: Tensor, member_I: Tensor) -> Clusters:
    """Clusters numbered without gaps, by rising low end."""
    count = int(member_I.max()) + 1
    low_K = points_I2.new_full((count,), torch.inf).scatter_reduce(0, member_I, points_I2[:, 0], "amin")
    high_K = points_I2.new_full((count,), -torch.inf).scatter_reduce(0, member_I, points_I2[:, 1], "amax")
    order_K = low_K.argsort(stable=True)
    order_K = order_K[low_K[order_K].isfinite()]
    number_K = torch.empty(count, dtype=torch.int64, device=member_I.device)
    number_K[order_K] = torch.arange(len(order_K), device=member_I.device)
    return Clusters(number_K[member_I], low_K[order_K], high_K[order_K])


def _split(points_I2: Tensor, clusters: Clusters) -> Clusters | None:
    """One cluster cut in two along one of the coordinates, where that saves most; None where all channels are alike."""
    most, apart = 0.0, None
    costs_K = torch.tensor(clusters.sizes, device=points_I2.device) * (clusters.high_K - clusters.low_K).square()
    for number in costs_K.argsort(descending=True, stable=True).tolist():
        cost = float(costs_K[number])
        if cost <= most:  # nor can any cluster after it save more
            break
        inside = (clusters.member_I == number).nonzero().flatten()
        for axis in range(2):
            order = inside[points_I2[inside, axis].argsort(stable=True)]
            place, remaining = _cheapest_cut(points_I2[order])
            if place and cost - remaining > most:
                most, apart = cost - remaining, order[place:]
    if apart is None:
        return None
    return _covering(points_I2, clusters.member_I.index_fill(0, apart, len(clusters.low_K)))


def _cheapest_cut(points_N2: Tensor) -> tuple[int, float]:
    """Where to cut a row of channels so that the two ranges cost least, and that cost; 0 for one channel."""
    if len(points_N2) < 2:
        return 0, 0.0
    low, high = points_N2[:, 0], points_N2[:, 1]
    left = (high.cummax(0).values - low.cummin(0).values).square()
    right = (high.flip(0).cummax(0).values - low.flip(0).cummin(0).values).square().flip(0)
    first = torch.arange(1, len(points_N2), device=low.device)
    costs = first * left[:-1] + (len(points_N2) - first) * right[1:]
    return 1 + int(costs.argmin()), float(costs.min())


def _lloyd(points_I2: Tensor, member_I: Tensor) -> Tensor:
    """K-means starting from these clusters; a cluster that loses all its channels is removed."""
    for _ in range(_ROUNDS):
        count = int(member_I.max()) + 1
        sums_K2 = points_I2.new_zeros(count, 2).index_add(0, member_I, points_I2)
        centres_K2 = sums_K2 / torch.bincount(member_I, minlength=count).clamp_min(1)[:, None]
        moved_I = torch.cdist(points_I2, centres_K2, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        if torch.equal(moved_I, member_I):
            break
        alive_K = torch.bincount(moved_I, minlength=count) > 0
        member_I = (alive_K.cumsum(0) - 1)[moved_I]
    return member_I
