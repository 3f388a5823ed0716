"""Optuna's samplers by ask and tell: TPE, a Gaussian process, NSGA-II and NSGA-III."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from llmcompress.errors import CompressError, ExitCode
from llmcompress.plan_search.optimizers.base import OPTIMIZERS
from llmcompress.plan_search.optimizers.budget import Budget
from llmcompress.plan_search.optimizers.judging import Exploration, Explorer, beginning
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.problem import Outcome, Problem

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

_WORST = 1e3
"""The loss of a plan that failed, in nats."""
_FREE_TRIES = 2000
"""Plans beyond the limits that a sampler is told about between two that fit: they cost nothing, and it learns."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the line that Optuna logs for a new study and what it says about experimental arguments."""
    from optuna import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _require_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError as missing:
        raise CompressError(
            "search.optuna-missing",
            "this optimizer is one of Optuna's, which is not installed",
            fix='pip install "llmcompress[search]"',
            exit_code=ExitCode.USAGE,
        ) from missing


class Levels:
    """Plans as Optuna's parameters: for every unit with a choice the level of its option, from cheap to dear."""

    def __init__(self, space: PlanSpace, budget: Budget) -> None:
        self.space = space
        reference = (0,) * len(space.units)
        self._ladders = {unit: budget.ladder(reference, unit) for unit in space.free}

    def distributions(self) -> dict[str, BaseDistribution]:
        """One whole number per unit."""
        from optuna.distributions import IntDistribution

        return {f"{unit}": IntDistribution(0, len(ladder) - 1) for unit, ladder in self._ladders.items()}

    def plan(self, params: dict[str, int]) -> Plan:
        """The plan of such levels."""
        found = [0] * len(self.space.units)
        for unit, ladder in self._ladders.items():
            found[unit] = ladder[params[f"{unit}"]]
        return self.space.canonical(tuple(found))

    def params(self, plan: Plan) -> dict[str, int]:
        """The levels of a plan."""
        return {f"{unit}": ladder.index(plan[unit]) for unit, ladder in self._ladders.items()}


def log_loss(outcome: Outcome) -> float:
    """What is minimized: losses of plans lie orders of magnitude apart."""
    return math.log(max(outcome.loss, 1e-12)) if outcome.is_valid else math.log(_WORST)


class ModelBased(Explorer):
    """A sampler that learns from any plan: what it asks for is brought within the limits, and that it is told."""

    start: int = Field(default=16, ge=1)
    """Plans that it begins with: given ones that fit, and random ones."""

    @abstractmethod
    def sampler(self, seed: int) -> BaseSampler:
        """The sampler; it never draws at random by itself."""

    def explore(self, problem: Problem, random: np.random.Generator) -> Exploration:
        """One after the other."""
        _require_optuna()
        from optuna import create_study
        from optuna.trial import TrialState, create_trial

        budget = Budget(problem)
        levels = Levels(problem.space, budget)
        distributions = levels.distributions()
        with _quiet():
            study = create_study(sampler=self.sampler(int(random.integers(1 << 31))))
        told = yield beginning(problem, budget, random, self.start)
        while True:
            with _quiet():
                for outcome in told:
                    study.add_trial(
                        create_trial(
                            params=levels.params(outcome.plan), distributions=distributions, value=log_loss(outcome)
                        )
                    )
                trial = study.ask(distributions)
                asked = levels.plan(trial.params)
                study.tell(trial, state=TrialState.FAIL)
            told = yield [budget.within(asked, random)]


@OPTIMIZERS.register("tpe")
class TPE(ModelBased):
    """Tree-structured Parzen estimator, all units together.

    Source: Bergstra et al., Algorithms for Hyper-Parameter Optimization, 2011, as Optuna has it.
    """

    def sampler(self, seed: int) -> BaseSampler:
        """Multivariate, since the best options of two units depend on each other."""
        from optuna.samplers import TPESampler

        return TPESampler(seed=seed, n_startup_trials=0, multivariate=True)


@OPTIMIZERS.register("gp")
class GaussianProcess(ModelBased):
    """Bayesian optimization: a Gaussian process of the log loss, and the plan of most expected improvement.

    Source: Optuna's GPSampler (Matérn kernel with a length scale per unit).
    """

    def sampler(self, seed: int) -> BaseSampler:
        """For a loss without noise: the text is the same each time."""
        from optuna.samplers import GPSampler

        return GPSampler(seed=seed, n_startup_trials=0, deterministic_objective=True)


class MultiObjective(Explorer):
    """A genetic algorithm on the loss and all costs; plans beyond the limits are told as violations, unjudged.

    The first generation are given plans that fit, and random ones.
    """

    population: int = Field(default=24, ge=2)

    @abstractmethod
    def sampler(self, seed: int) -> BaseSampler:
        """The sampler."""

    def explore(self, problem: Problem, random: np.random.Generator) -> Exploration:
        """One after the other."""
        _require_optuna()
        from optuna import create_study

        budget = Budget(problem)
        levels, axes = Levels(problem.space, budget), list(problem.costs)
        distributions = levels.distributions()
        with _quiet():
            study = create_study(
                sampler=self.sampler(int(random.integers(1 << 31))), directions=["minimize"] * (1 + len(axes))
            )
            for first in beginning(problem, budget, random, self.population):
                study.enqueue_trial(levels.params(first))
        while True:
            with _quiet():
                number, drawn = self._fitting(study, levels, distributions, budget)
            if drawn is None:
                return
            (outcome,) = yield [drawn]
            costs = problem.cost(drawn)
            with _quiet():
                study.tell(number, [log_loss(outcome), *(costs[axis] for axis in axes)])

    def _fitting(
        self, study: Study, levels: Levels, distributions: dict[str, BaseDistribution], budget: Budget
    ) -> tuple[int, Plan | None]:
        """The next plan within the limits, by the number of its trial; those before it are told as violations."""
        for _ in range(_FREE_TRIES):
            trial = study.ask(distributions)
            plan = levels.plan(trial.params)
            excess = float(budget.excess(np.array([plan]))[0])
            trial.set_constraint("excess", excess)
            if excess == 0.0:
                return trial.number, plan
            costs = budget.problem.cost(plan)
            study.tell(trial, [math.log(_WORST), *costs.values()])
        return -1, None


@OPTIMIZERS.register("nsga2")
class NSGA2(MultiObjective):
    """Non-dominated sorting with crowding distance, on the loss and all costs at once: the front in one run.

    Source: Deb et al., NSGA-II, 2002, as Optuna has it.
    """

    def sampler(self, seed: int) -> BaseSampler:
        """Violations count before objectives."""
        from optuna.samplers import NSGAIISampler

        return NSGAIISampler(seed=seed, population_size=self.population)


@OPTIMIZERS.register("nsga3")
class NSGA3(MultiObjective):
    """NSGA-II with reference points instead of crowding distance, for three objectives and more.

    Source: Deb, Jain, NSGA-III, 2014, as Optuna has it.
    """

    def sampler(self, seed: int) -> BaseSampler:
        """Violations count before objectives."""
        from optuna.samplers import NSGAIIISampler

        return NSGAIIISampler(seed=seed, population_size=self.population)
