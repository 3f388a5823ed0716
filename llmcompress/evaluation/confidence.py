"""Expected calibration error: how far a model's confidence in its most likely token is from how often that is right.

M = windows, B = bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.evaluation.scores import WindowScores
from llmcompress.numerics.calibration_error import BINS, bins_of


def calibration_sums(windows: Sequence[WindowScores]) -> Tensor:
    """M×(B + 1): in every window and bin, confidence minus how often it was right, summed; and the number of tokens.

    Bins hold equally many of all tokens, in the order of their confidence.
    """
    confidence_N = torch.cat([window.best_logprob_P for window in windows]).double().exp()
    right_N = torch.cat([window.best_P == window.targets_P for window in windows]).double()
    lengths = torch.tensor([len(window.targets_P) for window in windows])
    bin_N = bins_of(confidence_N)
    window_N = torch.repeat_interleave(torch.arange(len(windows)), lengths)
    sums = torch.zeros(len(windows) * BINS, dtype=torch.float64)
    sums.index_add_(0, window_N * BINS + bin_N, confidence_N - right_N)
    return torch.cat([sums.view(len(windows), BINS), lengths[:, None].double()], -1)


def calibration_error(sums: Tensor) -> Tensor:
    """Of sums …×(B + 1): mean over bins of |confidence − share of right predictions|, each with its share of tokens.

    Source: Guo et al., arXiv 1706.04599, equation 3; Nguyen and O'Connor, arXiv 1508.05154 (bins of equal mass).
    """
    return sums[..., :BINS].abs().sum(-1) / sums[..., BINS]


def calibration_change(sums: Tensor) -> Tensor:
    """Of the sums of two models side by side: the second one's error minus the first one's."""
    return calibration_error(sums[..., BINS + 1 :]) - calibration_error(sums[..., : BINS + 1])
