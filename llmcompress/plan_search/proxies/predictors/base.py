"""The base class of predictors, and the predictor of plans: from one-hot rows to losses.

P = plans, F = features (options of all units).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict
from typing_extensions import override

from llmcompress.errors import CompressError, ExitCode
from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.registry import Registry

_FLOOR = 1e-3
"""Losses below this share of the median count as that much: the dense plan has none, and the logarithm no value."""
_FEWEST = 4
"""Fewer plans determine no spread."""


class Forecast(ABC):
    """What a predictor has learned."""

    @abstractmethod
    def mean(self, features_PF: np.ndarray) -> np.ndarray:
        """The expected target of every row."""

    @abstractmethod
    def spread(self, features_PF: np.ndarray) -> np.ndarray:
        """How far off that may be: a standard deviation."""


class Predictor(BaseModel, ABC):
    """One regression; the fields are its options.

    `start` is a forecast that was learned elsewhere: of plans whose linears are dense, or an estimate that is a sum.
    What is learned then is the difference from it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def fitted(
        self, features_PF: np.ndarray, targets_P: np.ndarray, *, start: Forecast | None = None, seed: int = 0
    ) -> Forecast:
        """Learn from these plans."""
        if start is None:
            return self.learned(features_PF, targets_P, seed=seed)
        rest = self.learned(features_PF, targets_P - start.mean(features_PF), seed=seed)
        return Corrected(start, rest)

    @abstractmethod
    def learned(self, features_PF: np.ndarray, targets_P: np.ndarray, *, seed: int) -> Forecast:
        """The same without a start."""


@dataclass(frozen=True, eq=False)
class Corrected(Forecast):
    """A forecast and what was learned of its error."""

    start: Forecast
    rest: Forecast

    @override
    def mean(self, features_PF: np.ndarray) -> np.ndarray:
        mean: np.ndarray = self.start.mean(features_PF) + self.rest.mean(features_PF)
        return mean

    @override
    def spread(self, features_PF: np.ndarray) -> np.ndarray:
        """That of the correction: it has learned from how far off the start was."""
        return self.rest.spread(features_PF)


PREDICTORS: Registry[Predictor] = Registry("predictor", "llmcompress.plan_search.proxies.predictors")


@dataclass(frozen=True, eq=False)
class PlanForecast:
    """A forecast of plans' losses. Inside, the logarithm of the loss is predicted: what choices do multiplies more
    than it adds up, and a few bad plans would otherwise outweigh all others."""

    space: PlanSpace
    forecast: Forecast

    def losses(self, plans: Sequence[Plan]) -> np.ndarray:
        """The expected loss of every plan (the median of what is thought possible)."""
        losses: np.ndarray = np.exp(self.forecast.mean(self.space.one_hot(plans)))
        return losses

    def drawn(self, plans: Sequence[Plan], random: np.random.Generator) -> np.ndarray:
        """Losses as they may be, drawn for each plan by itself: independent Thompson sampling.

        Source: White et al., arXiv 1910.11858 (BANANAS), section 3.
        """
        features_PF = self.space.one_hot(plans)
        noise_P = random.standard_normal(len(plans))
        losses: np.ndarray = np.exp(self.forecast.mean(features_PF) + noise_P * self.forecast.spread(features_PF))
        return losses


def fit_plans(
    predictor: Predictor,
    space: PlanSpace,
    plans: Sequence[Plan],
    losses: Sequence[float],
    *,
    start: PlanForecast | Additive | None = None,
    seed: int = 0,
) -> PlanForecast:
    """Learn from plans that were judged; those that failed are left out.

    `start`: what was learned from plans with dense linears (APQ's transfer), or an estimate that is a sum over units.

    Raises: CompressError when too few plans can be learned from.
    """
    losses_P = np.asarray(losses, dtype=float)
    usable = np.isfinite(losses_P)
    if usable.sum() < _FEWEST:
        raise CompressError(
            "search.few-plans",
            f"a predictor cannot learn from {int(usable.sum())} judged plans",
            fix=f"judge at least {_FEWEST} plans first",
            exit_code=ExitCode.USAGE,
        )
    features_PF = space.one_hot([plan for plan, good in zip(plans, usable, strict=True) if good])
    floor = _FLOOR * float(np.median(losses_P[usable])) or 1.0
    targets_P = np.log(np.maximum(losses_P[usable], floor))
    before = SumForecast(space, start, floor) if isinstance(start, Additive) else start.forecast if start else None
    return PlanForecast(space, predictor.fitted(features_PF, targets_P, start=before, seed=seed))


@dataclass(frozen=True, eq=False)
class SumForecast(Forecast):
    """An estimate that is a sum over units, as a forecast of the logarithm."""

    space: PlanSpace
    losses: Additive
    floor: float
    """Estimates below count as that much."""

    @override
    def mean(self, features_PF: np.ndarray) -> np.ndarray:
        totals = [self.losses.total(self.space, self.space.from_one_hot(row_F)) for row_F in features_PF]
        mean: np.ndarray = np.log(np.maximum(totals, self.floor))
        return mean

    @override
    def spread(self, features_PF: np.ndarray) -> np.ndarray:
        return np.zeros(len(features_PF))
