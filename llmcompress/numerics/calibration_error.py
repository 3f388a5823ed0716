"""Expected calibration error, in bins of equal mass. N = predictions."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15
"""Of equal mass: as many predictions in each."""


def bins_of(confidence_N: Tensor) -> Tensor:
    """The bin of every prediction: each holds equally many, in the order of their confidence."""
    bin_N = torch.empty(len(confidence_N), dtype=torch.long, device=confidence_N.device)
    numbers_N = torch.arange(len(confidence_N), device=confidence_N.device)
    bin_N[confidence_N.argsort(stable=True)] = numbers_N * BINS // max(1, len(confidence_N))
    return bin_N


def expected_calibration_error(confidence_N: Tensor, right_N: Tensor) -> float:
    """Mean over bins of |confidence - share of right predictions|, each with its share of predictions.

    Source: Guo et al., arXiv 1706.04599, equation 3; Nguyen and O'Connor, arXiv 1508.05154 (bins of equal mass).
    """
    gaps_N = confidence_N.double() - right_N.double()
    sums = gaps_N.new_zeros(BINS).index_add_(0, bins_of(confidence_N), gaps_N)
    return float(sums.abs().sum() / max(1, len(confidence_N)))
