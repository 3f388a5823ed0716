"""Exact optima of losses that are sums over units, by dynamic programming or as an integer program."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from llmcompress.errors import CompressError, ExitCode
from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.optimizers.additive_optimum import least_loss
from llmcompress.plan_search.optimizers.base import OPTIMIZERS
from llmcompress.plan_search.optimizers.estimated_optima import Optimum, at_rates, estimated_optima, halfway
from llmcompress.plan_search.optimizers.judging import Exploration, Explorer, badness
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
        for optimum in estimated_optima(problem.space, losses, problem.costs, problem.limits):
            (told,) = yield [optimum.plan]
            judged.append((told, optimum))
        if not judged:
            return
        judged.sort(key=lambda each: badness(problem, each[0]))
        for _ in range(self.halvings):
            for narrow, dropped in halfway([optimum for _, optimum in judged]):
                around = at_rates(problem.space, losses, narrow, dropped)
                plan = least_loss(problem.space, around, problem.costs, problem.limits)
                if plan is not None and all(plan != optimum.plan for _, optimum in judged):
                    (told,) = yield [plan]
                    judged.append((told, Optimum(plan, narrow, dropped)))
            judged.sort(key=lambda each: badness(problem, each[0]))
        while True:
            _, near = judged[min(int(random.geometric(0.5)), len(judged)) - 1]
            narrow, dropped = np.exp(self.rate_spread * random.standard_normal(2))
            around = at_rates(problem.space, losses, near.narrow * float(narrow), near.dropped * float(dropped))
            noisy = Additive(
                around.base,
                {unit: row * _noise(row, self.spread, random) for unit, row in around.of_unit.items()},
                {unit: rows * _noise(rows, self.spread, random) for unit, rows in around.of_sites.items()},
            )
            plan = least_loss(problem.space, noisy, problem.costs, problem.limits)
            if plan is None:
                return
            yield [plan]


def _noise(like: np.ndarray, spread: float, random: np.random.Generator) -> np.ndarray:
    return np.asarray(np.exp(spread * random.standard_normal(like.shape)))
