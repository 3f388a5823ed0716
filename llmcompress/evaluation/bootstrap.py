"""95 % intervals by resampling whole windows, since tokens of one window are not independent. M = windows (or groups of
them), S = samples, J = sums that a statistic is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmcompress.records.measurements import Estimate

SAMPLES = 2000
MOST_UNITS = 1000
"""More windows than that are drawn in groups of neighbours."""
SEED = 0
NORMAL = 1.959964
"""Between −1.96 and 1.96 lie 95 % of a normal distribution."""

Statistic = Callable[[Tensor], Tensor]
"""Sums …×J over windows → …: what is estimated."""


class Bootstrap:
    """One set of samples for all statistics of the same windows, so that they are paired and drawn once."""

    def __init__(self, windows: int) -> None:
        self._units = min(windows, MOST_UNITS)
        self._unit_of_window = torch.arange(windows) * self._units // max(windows, 1)
        random = torch.Generator().manual_seed(SEED)
        drawn_SM = torch.randint(self._units, (SAMPLES, self._units), generator=random)
        ones_SM = torch.ones(SAMPLES, self._units, dtype=torch.float64)
        self._times_SM = torch.zeros_like(ones_SM).scatter_add_(1, drawn_SM, ones_SM)

    def mean(self, windows: Sequence[Tensor]) -> Estimate:
        """Mean over all tokens, with the linearised error of a ratio of sums.

        sqrt(M / (M - 1) · Σ_w (s_w - n_w · mean)²) ÷ Σ_w n_w for M windows with n_w tokens of sum s_w.

        Source: Cochran, Sampling Techniques, 3rd edition, section 6.3 (ratio estimates), for clusters of unequal size.
        """
        sums_MJ = torch.stack([_sum_and_count(window) for window in windows])
        mean = float(_ratio(sums_MJ.sum(0)))
        return Estimate(mean=mean, standard_error=_linearised(sums_MJ, mean), **self.interval(sums_MJ, _ratio))

    def statistic(self, sums_MJ: Tensor, statistic: Statistic) -> Estimate:
        """Anything that is computed from sums over windows; the error is the spread over samples."""
        value = float(statistic(sums_MJ.sum(0)))
        if len(sums_MJ) < 2:
            return Estimate(mean=value, standard_error=None)
        spread = statistic(self._times_SM @ self._grouped(sums_MJ)).std()
        return Estimate(mean=value, standard_error=float(spread), **self.interval(sums_MJ, statistic))

    def interval(self, sums_MJ: Tensor, statistic: Statistic) -> dict[str, float | None]:
        """`low` and `high` of the bias-corrected and accelerated interval (BCa); None with fewer than two windows.

        Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 14.3.
        """
        if len(sums_MJ) < 2:
            return {"low": None, "high": None}
        units_MJ = self._grouped(sums_MJ)
        total_J = units_MJ.sum(0)
        value, found_S = statistic(total_J), statistic(self._times_SM @ units_MJ).sort().values
        below = (found_S < value).double().mean() + (found_S == value).double().mean() / 2
        bias = torch.special.ndtri(below.clamp(1 / SAMPLES, 1 - 1 / SAMPLES))
        without_M = statistic(total_J - units_MJ)
        apart_M = without_M.mean() - without_M
        spread = apart_M.square().sum()
        acceleration = apart_M.pow(3).sum() / (6 * spread.pow(1.5)) if spread > 0 else torch.zeros_like(spread)
        ends = bias + torch.tensor([-NORMAL, NORMAL], dtype=torch.float64)
        shares = torch.special.ndtr(bias + ends / (1 - acceleration * ends))
        low, high = torch.quantile(found_S, shares.nan_to_num(0.5)).tolist()
        # a statistic whose samples all lie to one side (a calibration error of few tokens) is an end itself
        return {"low": min(low, float(value)), "high": max(high, float(value))}

    def quantile(self, windows: Sequence[Tensor], share: float) -> tuple[float, tuple[float, float] | None]:
        """The smallest value that at least `share` of all tokens do not exceed, and its interval.

        The interval is that of the share of tokens up to this value, read off at its ends.

        Source: Woodruff, Confidence intervals for medians and other position measures, JASA 47 (1952).
        """
        sorted_N = torch.cat(list(windows)).sort().values
        value = float(sorted_N[_rank(share, len(sorted_N))])
        if len(windows) < 2:
            return value, None
        sums_MJ = torch.stack([_sum_and_count(window <= value) for window in windows])
        ends = self.interval(sums_MJ, _ratio)
        low, high = (float(sorted_N[_rank(end or 0.0, len(sorted_N))]) for end in (ends["low"], ends["high"]))
        return value, (min(low, value), max(high, value))

    def _grouped(self, sums_MJ: Tensor) -> Tensor:
        grouped_MJ = torch.zeros(self._units, sums_MJ.shape[1], dtype=torch.float64)
        return grouped_MJ.index_add_(0, self._unit_of_window, sums_MJ.double())


def estimate(windows: Sequence[Tensor]) -> Estimate:
    """Mean over all tokens of some windows, with windows as the unit that varies."""
    return Bootstrap(len(windows)).mean(windows)


def _linearised(sums_MJ: Tensor, mean: float) -> float | None:
    count = len(sums_MJ)
    if count < 2:
        return None
    spread = (sums_MJ[:, 0] - sums_MJ[:, 1] * mean).square().sum() * count / (count - 1)
    return float(spread.sqrt() / sums_MJ[:, 1].sum())


def _sum_and_count(window: Tensor) -> Tensor:
    return torch.tensor([float(window.sum(dtype=torch.float64)), float(len(window))], dtype=torch.float64)


def _ratio(sums_J: Tensor) -> Tensor:
    return sums_J[..., 0] / sums_J[..., 1]


def _rank(share: float, count: int) -> int:
    return min(count, max(1, math.ceil(share * count))) - 1
