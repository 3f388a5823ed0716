"""Exact optima of losses that are sums over units, by dynamic programming or as an integer program."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from llmcompress.errors import CompressError, ExitCode
from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.optimizers.additive_optimum import least_loss
from llmcompress.plan_search.optimizers.base import OPTIMIZERS
from llmcompress.plan_search.optimizers.estimated_optima import Optimum, at_rates, estimated_optima, halfway, has_shapes
from llmcompress.plan_search.optimizers.judging import Exploration, Explorer, badness
from llmcompress.plan_search.plan_space import Plan
from llmcompress.plan_search.problem import Outcome, Problem


@OPTIMIZERS.register("exact")
class Exact(Explorer):
    """The plan of least estimated loss within the limits, the same at other exchange rates between shapes and bits,
    then at rates between the best and the next ones, and at last for losses and rates with noise: half of the time near
    the rate whose plan was judged best, a quarter near the next, ….

    The first plan is the optimum where losses add up. They do not quite, and estimates have errors: optima of losses
    that are a little different are the plans next to it which are worth judging.
    Source: the multiple-choice knapsack of AutoRound's AutoScheme and EvoPress's dynamic programming, here with bodies,
    dropping and several limits.
    """

    spread: float = Field(default=0.1, ge=0)
    """Standard deviation of the noise on the logarithm of each loss."""
    rate_spread: float = Field(default=0.3, ge=0)
    """The same of the exchange rates: one for all narrow bodies, one for dropping."""
    halvings: int = Field(default=2, ge=0)
    """How often the distance between the best exchange rates and the next ones is halved before noise is drawn."""
    batch: int = Field(default=4, ge=1)
    """Plans drawn with noise at once, which workers may judge at the same time."""

    def explore(self, problem: Problem, random: np.random.Generator) -> Exploration:
        """The optimum, then optima with noise.

        Raises: CompressError where the problem has no estimate that adds up.
        """
        losses = problem.losses
        if losses is None:
            raise CompressError(
                "search.no-losses",
                "the exact optimum needs losses that are sums over units, and this search has none",
                fix="choose an optimizer that judges plans only, such as evopress",
                exit_code=ExitCode.USAGE,
            )
        judged: list[tuple[Outcome, Optimum]] = []
        for number in range(1 + self.halvings):
            if number == 0:
                new = list(estimated_optima(problem.space, losses, problem.costs, problem.limits))
            else:
                new = _between(problem, losses, [optimum for _, optimum in judged])
            if new:
                told = yield [each.plan for each in new]
                judged = sorted([*judged, *zip(told, new, strict=True)], key=lambda each: badness(problem, each[0]))
            if not judged:
                return
        optima = [optimum for _, optimum in judged]
        while plans := [plan for _ in range(self.batch) if (plan := self._drawn(problem, losses, optima, random))]:
            yield plans

    def _drawn(
        self, problem: Problem, losses: Additive, optima: Sequence[Optimum], random: np.random.Generator
    ) -> Plan | None:
        """The optimum with noise near one of these, whose order tells how likely it is taken."""
        near = optima[min(int(random.geometric(0.5)), len(optima)) - 1]
        narrow, dropped = np.exp(self.rate_spread * random.standard_normal(2))
        around = at_rates(problem.space, losses, near.narrow * float(narrow), near.dropped * float(dropped))
        noisy = Additive(
            around.base,
            {unit: row * _noise(row, self.spread, random) for unit, row in around.of_unit.items()},
            {unit: rows * _noise(rows, self.spread, random) for unit, rows in around.of_sites.items()},
        )
        return least_loss(problem.space, noisy, problem.costs, problem.limits)


def _between(problem: Problem, losses: Additive, optima: Sequence[Optimum]) -> list[Optimum]:
    """New plans at exchange rates between those of the first and the next ones."""
    known, new = {each.plan for each in optima}, []
    # where only bits are chosen, every rate has the same optimum
    for narrow, dropped in halfway(optima) if has_shapes(problem.space) else ():
        scaled = at_rates(problem.space, losses, narrow, dropped)
        plan = least_loss(problem.space, scaled, problem.costs, problem.limits)
        if plan is not None and plan not in known:
            known.add(plan)
            new.append(Optimum(plan, narrow, dropped))
    return new


def _noise(like: np.ndarray, spread: float, random: np.random.Generator) -> np.ndarray:
    return np.asarray(np.exp(spread * random.standard_normal(like.shape)))
