"""DARTS-like gates: a softmax over the options of every unit, moved by gradients of the loss and of the expected cost.

L = logits of all units one after the other.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from llmcompress.plan_search.optimizers.base import OPTIMIZERS
from llmcompress.plan_search.optimizers.budget import Budget
from llmcompress.plan_search.optimizers.judging import Exploration, Explorer
from llmcompress.plan_search.optimizers.mixture import Adam, ExpectedCosts, Logits, relaxation_of
from llmcompress.plan_search.plan_space import Plan
from llmcompress.plan_search.problem import Problem


def min_norm(first_L: np.ndarray, second_L: np.ndarray) -> np.ndarray:
    """The shortest convex combination of two gradients: a step against it raises neither.

    Source: Sener, Koltun, Multi-Task Learning as Multi-Objective Optimization, arXiv 1810.04650, equation 4.
    """
    apart_L = first_L - second_L
    square = float(apart_L @ apart_L)
    share = min(max(float(-apart_L @ second_L) / square, 0.0), 1.0) if square else 0.5
    return np.asarray(share * first_L + (1.0 - share) * second_L)


@OPTIMIZERS.register("darts")
class DARTS(Explorer):
    """All options of a unit at once, weighted by a softmax of logits that follow the loss and the expected cost.

    While costs exceed their limits, the gradient of what they exceed them by counts too: as a sum with `weight`, or as
    the shortest convex combination (MGDA), which raises neither. At the end the likeliest plan within the limits
    counts; on the way such plans are judged too.
    Source: Liu et al., DARTS, arXiv 1806.09055; expected cost in the loss: Cai et al., ProxylessNAS, arXiv 1812.00332,
    section 3.3.
    Differs: the inner problem is solved beforehand, since each option's weights are levels and do not change, so that
    every step is one of the outer problem, on another part of the text.
    """

    steps: int = Field(default=60, ge=1)
    """Each with one forward and one backward pass."""
    rate: float = Field(default=0.2, gt=0)
    combine: Literal["sum", "min_norm"] = "sum"
    """How the gradients of loss and cost become one."""
    weight: float = Field(default=4.0, gt=0)
    """Of the cost's gradient in the sum, relative to the length of the loss's."""
    coldest: float = Field(default=0.3, gt=0)
    """Temperature of the softmax at the last step; it falls geometrically from 1."""
    judged: int = Field(default=10, ge=1)
    """Plans that are judged on the way."""

    def explore(self, problem: Problem, random: np.random.Generator) -> Exploration:
        """Plans on the way, then others drawn from the last softmax."""
        relaxation, logits, budget = relaxation_of(problem, "darts"), Logits(problem.space), Budget(problem)
        costs, adam = ExpectedCosts(problem, logits), Adam(logits.size, self.rate)
        logits_L = np.zeros(logits.size)
        if logits.likeliest(logits_L, problem) is None:
            return
        for step in range(self.steps):
            temperature = self.coldest ** (step / max(self.steps - 1, 1))
            shares_L = logits.softmax(logits_L / temperature)
            _, found = relaxation.loss_and_gradient(logits.split(shares_L), step)
            loss_L = logits.through_softmax(shares_L, np.concatenate(found)) / temperature
            logits_L = logits_L + adam.step(self._combined(loss_L, logits_L / temperature, costs))
            if (step + 1) % max(1, self.steps // self.judged) == 0:
                yield [self._plan(logits_L, logits, problem, budget, random)]
        while True:
            yield [
                self._plan(logits_L / self.coldest + random.gumbel(size=logits.size), logits, problem, budget, random)
            ]

    def _combined(self, loss_L: np.ndarray, logits_L: np.ndarray, costs: ExpectedCosts) -> np.ndarray:
        over_A = np.maximum(costs.shares(logits_L) - 1.0, 0.0)
        if not over_A.any():
            return loss_L
        cost_L = costs.normals(logits_L)[over_A > 0].sum(0)
        length = float(np.linalg.norm(loss_L)) / (float(np.linalg.norm(cost_L)) or 1.0)
        if self.combine == "min_norm":
            return min_norm(loss_L, cost_L * length)
        return np.asarray(loss_L + self.weight * length * cost_L)

    def _plan(
        self, logits_L: np.ndarray, logits: Logits, problem: Problem, budget: Budget, random: np.random.Generator
    ) -> Plan:
        plan = logits.likeliest(logits_L, problem)
        assert plan is not None
        return budget.filled(plan, random)
