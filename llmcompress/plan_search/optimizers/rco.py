"""RCO-like relaxation: gradients of the loss on the set of mixtures that cost exactly the budget.

L = logits of all units one after the other.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from llmcompress.plan_search.optimizers.base import OPTIMIZERS
from llmcompress.plan_search.optimizers.budget import Budget
from llmcompress.plan_search.optimizers.judging import Exploration, Explorer
from llmcompress.plan_search.optimizers.mixture import Adam, ExpectedCosts, Logits, relaxation_of
from llmcompress.plan_search.plan_space import Plan
from llmcompress.plan_search.problem import Problem


@OPTIMIZERS.register("rco")
class RCO(Explorer):
    """Plans are drawn within the budget, and the gradient at each moves the logits that it was drawn from.

    Each step: Gumbel noise on the logits, the likeliest plan within the limits, the gradient of its loss in the shares
    straight through to the logits, projected onto what does not change the expected cost; a step of Adam; logits
    shifted along the costs back onto the limit; Adam's mean projected again.
    Source: Helcig, Alistarh, Model Compression with Exact Budget Constraints via Riemannian Manifolds, arXiv
    2605.00649; rate, temperatures and samples are those of its code.
    Differs: several limits (the tightest is reached exactly, the others are kept); bodies and dropping; plans on the
    way and plans drawn from what was learned are judged, so that the best of them is taken and not only the last.
    """

    steps: int = Field(default=60, ge=1)
    """Each with `samples` forward and backward passes."""
    samples: int = Field(default=4, ge=1)
    rate: float = Field(default=0.1, gt=0)
    hottest: float = Field(default=1.0, gt=0)
    """Temperature of the first step; it falls geometrically."""
    coldest: float = Field(default=0.05, gt=0)
    judged: int = Field(default=10, ge=1)
    """Plans that are judged on the way."""

    def explore(self, problem: Problem, random: np.random.Generator) -> Exploration:
        """Plans on the way, then others drawn from the last logits."""
        relaxation, logits, budget = relaxation_of(problem, "rco"), Logits(problem.space), Budget(problem)
        costs, adam = ExpectedCosts(problem, logits), Adam(logits.size, self.rate)
        logits_L = costs.retracted(np.zeros(logits.size))
        if logits.likeliest(logits_L, problem) is None:
            return
        for step in range(self.steps):
            fallen = step / max(self.steps - 1, 1)
            temperature = self.hottest * (self.coldest / self.hottest) ** fallen
            gradient_L = np.zeros(logits.size)
            for sample in range(self.samples):
                noisy_L = (logits_L + random.gumbel(size=logits.size)) / temperature
                plan = logits.likeliest(noisy_L, problem)
                assert plan is not None
                _, found = relaxation.loss_and_gradient(
                    logits.split(logits.one_hot(plan)), step * self.samples + sample
                )
                soft_L = logits.softmax(noisy_L)
                gradient_L += logits.through_softmax(soft_L, np.concatenate(found)) / (temperature * self.samples)
            logits_L = costs.retracted(logits_L + adam.step(costs.tangent(logits_L, gradient_L)))
            adam.mean_L = costs.tangent(logits_L, adam.mean_L)
            if (step + 1) % max(1, self.steps // self.judged) == 0:
                yield [self._plan(logits_L, logits, problem, budget, random)]
        while True:
            yield [self._plan(logits_L + random.gumbel(size=logits.size), logits, problem, budget, random)]

    def _plan(
        self, logits_L: np.ndarray, logits: Logits, problem: Problem, budget: Budget, random: np.random.Generator
    ) -> Plan:
        plan = logits.likeliest(logits_L, problem)
        assert plan is not None
        return budget.filled(plan, random)
