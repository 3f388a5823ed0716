"""Random plans that fit: what every other optimizer has to beat."""

from __future__ import annotations

import numpy as np

from llmcompress.plan_search.optimizers.base import OPTIMIZERS
from llmcompress.plan_search.optimizers.budget import Budget
from llmcompress.plan_search.optimizers.judging import Exploration, Explorer
from llmcompress.plan_search.problem import Problem


@OPTIMIZERS.register("random")
class RandomSearch(Explorer):
    """Plans drawn at random, brought within the limits, and what is left of the limits used at random."""

    def explore(self, problem: Problem, random: np.random.Generator) -> Exploration:
        """One after the other: they may be judged in any order."""
        budget = Budget(problem)
        while True:
            yield [budget.random(random)]
