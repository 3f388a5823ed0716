"""Policy gradient: options are drawn from a softmax of every unit, and what was rewarded becomes likelier.

L = logits of all units one after the other.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import Field

from llmcompress.plan_search.optimizers.base import OPTIMIZERS
from llmcompress.plan_search.optimizers.budget import Budget
from llmcompress.plan_search.optimizers.judging import Exploration, Explorer
from llmcompress.plan_search.optimizers.mixture import Adam, Logits
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.problem import Outcome, Problem
from llmcompress.plan_search.selection import scalar_reward

_WORST = 30.0
"""−log loss of a plan that failed."""


@OPTIMIZERS.register("policy_gradient")
class PolicyGradient(Explorer):
    """REINFORCE: plans drawn from the policy, better ones than the mean of what was seen made likelier.

    `constrained` is AMC's way: actions are limited to what the budget allows, and the reward is −log loss. `soft` and
    `hard` are MnasNet's: plans may exceed the limits, and the reward counts by how much.
    Source: He et al., AMC, arXiv 1802.03494; Tan et al., MnasNet, arXiv 1807.11626; the estimator: Williams, 1992.
    Differs: a softmax per unit instead of a network that sees the layers, because a search here has hundreds of trials
    and not thousands.
    """

    reward: Literal["constrained", "soft", "hard"] = "constrained"
    batch: int = Field(default=8, ge=1)
    """Plans judged between two steps."""
    rate: float = Field(default=0.2, gt=0)
    entropy: float = Field(default=0.01, ge=0)
    """Weight of the policy's entropy, against settling too early."""

    def explore(self, problem: Problem, random: np.random.Generator) -> Exploration:
        """Batch by batch."""
        budget, logits = Budget(problem), Logits(problem.space)
        logits_L, adam = np.zeros(logits.size), Adam(logits.size, self.rate)
        seen: list[float] = []
        while True:
            plans = [self._drawn(logits_L, logits, budget, random) for _ in range(self.batch)]
            outcomes = yield plans
            rewards = np.array([self._reward(each, problem) for each in outcomes])
            seen.extend(rewards)
            gain = (rewards - np.mean(seen)) / (np.std(seen) or 1.0)
            shares_L = logits.softmax(logits_L)
            gradient_L = -sum(
                gain[row] * (logits.one_hot(each.plan) - shares_L) for row, each in enumerate(outcomes)
            ) / len(outcomes)
            spread_L = logits.through_softmax(shares_L, np.log(np.maximum(shares_L, 1e-12)))
            logits_L = logits_L + adam.step(gradient_L + self.entropy * spread_L)

    def _drawn(self, logits_L: np.ndarray, logits: Logits, budget: Budget, random: np.random.Generator) -> Plan:
        noisy = logits.split(logits_L + random.gumbel(size=logits.size))
        plan = tuple(int(row.argmax()) for row in noisy)
        if self.reward == "constrained":
            return budget.within(plan, random)
        return legal(plan, noisy, budget.space, random)

    def _reward(self, outcome: Outcome, problem: Problem) -> float:
        if self.reward == "constrained" or not outcome.is_valid:
            return -math.log(max(outcome.loss, 1e-12)) if outcome.is_valid else -_WORST
        costs = {**problem.cost(outcome.plan), **outcome.costs}
        known = Outcome(outcome.plan, outcome.tokens, outcome.loss, costs)
        below, above = (-0.07, -0.07) if self.reward == "soft" else (0.0, -1.0)
        targets = {axis: limit for axis, limit in problem.limits.items() if axis in costs}
        return math.log(max(scalar_reward(known, targets, below=below, above=above), 1e-12))


def legal(plan: Plan, noisy: list[np.ndarray], space: PlanSpace, random: np.random.Generator) -> Plan:
    """The plan with fewer dropped blocks, until no more are than may be: some of them have the next likely body."""
    found, gone = list(plan), [body for body in space.bodies if space.is_dropped(plan, body)]
    while not space.is_legal(tuple(found)):
        body = gone.pop(int(random.integers(len(gone))))
        found[body] = int(noisy[body][: len(space.space.bodies)].argmax())
    return space.canonical(tuple(found))
