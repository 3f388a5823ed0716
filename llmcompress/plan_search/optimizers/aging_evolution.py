"""Aging evolution: the oldest plan dies, not the worst."""

from __future__ import annotations

from collections import deque

import numpy as np
from pydantic import Field

from llmcompress.plan_search.optimizers.base import OPTIMIZERS
from llmcompress.plan_search.optimizers.budget import Budget
from llmcompress.plan_search.optimizers.judging import Exploration, Explorer, badness, beginning
from llmcompress.plan_search.problem import Outcome, Problem


@OPTIMIZERS.register("aging_evolution")
class AgingEvolution(Explorer):
    """The best of a few plans drawn from the population has a child with one changed unit; the oldest plan leaves.

    Source: Real et al., Regularized Evolution for Image Classifier Architecture Search, arXiv 1802.01548, algorithm 1.
    Differs: children are brought within the limits; a smaller population, since fewer plans are judged (theirs: 100
    and 25 of 20,000).
    """

    population: int = Field(default=20, ge=2)
    sample: int = Field(default=5, ge=1)
    """Plans drawn for each child; the best of them is its parent."""

    def explore(self, problem: Problem, random: np.random.Generator) -> Exploration:
        """The population at once, then one child after the other."""
        budget = Budget(problem)
        told = yield beginning(problem, budget, random, self.population)
        alive: deque[Outcome] = deque(told, maxlen=max(len(told), 1))
        while alive:
            drawn = random.choice(len(alive), size=min(self.sample, len(alive)), replace=False)
            parent = min((alive[int(index)] for index in drawn), key=lambda each: badness(problem, each))
            alive.extend((yield [budget.mutated(parent.plan, random)]))
