"""How well a cheap number orders plans: Kendall's rank correlation with the number that it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.proxies.predictors.base import PlanForecast, Predictor, fit_plans


@dataclass(frozen=True)
class RankCorrelation:
    """Kendall's τ-b of two orders of the same plans."""

    tau: float
    """1: the same order; 0: none in common; -1: reversed. Not a number where all are equal."""
    error: float
    """Standard error by the jackknife over plans."""
    count: int
    """Plans."""


def rank_correlation(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> RankCorrelation:
    """Of numbers of the same plans; a failed plan is infinite, and so the last."""
    one_P, other_P = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    count = len(one_P)
    parts = [_tau(np.delete(one_P, index), np.delete(other_P, index)) for index in range(count)] if count > 2 else []
    error = float(np.sqrt((count - 1) * np.var(parts))) if parts else float("nan")
    return RankCorrelation(_tau(one_P, other_P), error, count)


def held_out_losses(
    predictor: Predictor,
    space: PlanSpace,
    plans: Sequence[Plan],
    losses: Sequence[float],
    *,
    start: PlanForecast | Additive | None = None,
    folds: int = 5,
) -> np.ndarray:
    """For every plan the loss that a predictor expects which learned from the other folds; `start` as there."""
    fold_P = np.random.default_rng(0).permutation(len(plans)) % folds
    found = np.empty(len(plans))
    for fold in range(folds):
        inside = [index for index, part in enumerate(fold_P) if part != fold]
        outside = [index for index, part in enumerate(fold_P) if part == fold]
        known, told = [plans[each] for each in inside], [losses[each] for each in inside]
        learned = fit_plans(predictor, space, known, told, start=start)
        found[outside] = learned.losses([plans[each] for each in outside])
    return found


def _tau(one_P: np.ndarray, other_P: np.ndarray) -> float:
    from scipy.stats import kendalltau

    return float(kendalltau(one_P, other_P).statistic)
