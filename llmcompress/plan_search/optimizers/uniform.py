"""Uniform plans: one choice for all linears and one for all bodies, as recipes without a search have."""

from __future__ import annotations

from itertools import product

import numpy as np

from llmcompress.plan_search.optimizers.base import OPTIMIZERS
from llmcompress.plan_search.optimizers.budget import Budget
from llmcompress.plan_search.optimizers.judging import Exploration, Explorer
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.problem import Problem


def uniform_plans(space: PlanSpace) -> list[Plan]:
    """One choice for all linears, one for all bodies, one each for `before` and `after`; no block is dropped."""
    chosen = space.space
    return [
        space.uniform(site, body=body, before=before, after=after)
        for site, body, before, after in product(chosen.sites, chosen.bodies, chosen.before, chosen.after)
    ]


@OPTIMIZERS.register("uniform")
class Uniform(Explorer):
    """All uniform plans that fit, the dearest first."""

    def explore(self, problem: Problem, random: np.random.Generator) -> Exploration:
        """All at once, as far as the trials reach."""
        budget = Budget(problem)
        plans = [plan for plan in dict.fromkeys(uniform_plans(problem.space)) if budget.fits(plan)]
        if plans:
            spent = budget.spent(np.array(plans))
            yield [plans[index] for index in np.argsort(-spent, kind="stable")]
