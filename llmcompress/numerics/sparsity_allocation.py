"""Sparsity allocation under one budget. P = parts (sites or blocks), S = candidate sparsities."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from llmcompress.numerics.allocation import lower_convex_hull
from llmcompress.numerics.masks import count_of_zeros


def counts_by_outliers(outliers_P: Tensor, weights_P: Tensor, target: float, within: float) -> Tensor:
    """Parts with more outliers lose fewer weights; every share stays `within` of the target, and the total is exact.

    `outliers_P` are shares of outliers. All parts with as many outliers get the same share.

    Source: Yin et al., arXiv 2310.05175, section 3 (OWL). Differs: the shares are stretched until the largest
    deviation is `within`, as the paper's bound says, and their mean is weighted by the parts' sizes.
    """
    outliers_P, weights_P = outliers_P.double(), weights_P.double()
    deviation_P = (outliers_P * weights_P).sum() / weights_P.sum() - outliers_P
    largest = float(deviation_P.abs().max())
    within = min(within, target, 1 - target)
    stretch = within / largest if largest > 1e-12 else 0.0
    return _rounded(target + stretch * deviation_P, weights_P, target)


def counts_by_error(errors_PS: Tensor, sparsities_S: Tensor, weights_P: Tensor, target: float) -> Tensor:
    """The counts with the least sum of errors, each part's error known at the same rising shares.

    Errors are interpolated on the convex curve from below, on which taking the cheapest step first is optimal. The
    lowest and highest share bound every part; the target must lie between them.
    """
    errors_PS, sparsities_S, weights_P = errors_PS.double(), sparsities_S.double(), weights_P.double()
    steps: list[tuple[float, int, float]] = []
    for part, (errors_S, weights) in enumerate(zip(errors_PS.tolist(), weights_P.tolist(), strict=True)):
        points = list(zip(sparsities_S.tolist(), errors_S, strict=True))
        curve = (points[index] for index in lower_convex_hull(points))
        for (share, error), (next_share, next_error) in pairwise(curve):
            dropped = (next_share - share) * weights
            steps.append(((next_error - error) / dropped, part, dropped))
    counts_P = sparsities_S[0] * weights_P
    budget = target * float(weights_P.sum()) - float(counts_P.sum())
    # slopes of one part rise, so the sorted order takes every part's steps in their own order
    for _, part, dropped in sorted(steps):
        taken = min(dropped, max(budget, 0.0))
        counts_P[part] += taken
        budget -= taken
    return _rounded(counts_P / weights_P, weights_P, target)


def _rounded(sparsities_P: Tensor, weights_P: Tensor, target: float) -> Tensor:
    """Whole numbers near share · weights; their sum is that of the target, whatever float64 made of the shares."""
    ends = [math.floor(end + 0.5) for end in (sparsities_P * weights_P).cumsum(0).tolist()]
    ends[-1] = count_of_zeros(target, int(weights_P.sum()))
    return torch.tensor([end - start for start, end in pairwise([0, *ends])], dtype=torch.int64)
