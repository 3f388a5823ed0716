"""BANANAS-like Bayesian optimization: an ensemble on paths, Thompson sampling, candidates by mutation."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from llmcompress.search.encodings import PathEncoding
from llmcompress.search.optimizers.base import OPTIMIZERS
from llmcompress.search.optimizers.budget import Budget
from llmcompress.search.optimizers.judging import Explorer, Exploration, badness, beginning
from llmcompress.search.optimizers.optuna_samplers import log_loss
from llmcompress.search.optimizers.predictors import Ensemble
from llmcompress.search.plan_space import Plan
from llmcompress.search.problem import Outcome, Problem


@OPTIMIZERS.register("bananas")
class BANANAS(Explorer):
    """Mutations of the best plans so far; for each the ensemble draws a loss, and those of the least drawn are judged.

    Source: White et al., BANANAS, arXiv 1910.11858, algorithm 1: path encoding, 5 networks, independent Thompson
    sampling, mutated candidates, 10 plans per round.
    Differs: a network of two layers of 32 instead of ten of 20, on pieces of paths; the log loss is predicted.
    """

    start: int = Field(default=20, ge=2)
    """Plans judged before the first ensemble: given ones that fit, and random ones."""
    members: int = Field(default=5, ge=2)
    candidates: int = Field(default=100, ge=1)
    """Mutations that are predicted each round."""
    batch: int = Field(default=10, ge=1)
    """Plans judged each round."""

    def explore(self, problem: Problem, random: np.random.Generator) -> Exploration:
        """Round by round."""
        budget, paths = Budget(problem), PathEncoding(problem.space)
        ensemble, seen = Ensemble(members=self.members, hidden=(32, 32)), dict[Plan, Outcome]()
        told = yield beginning(problem, budget, random, self.start)
        while told or seen:
            seen.update((each.plan, each) for each in told)
            ensemble.fit(paths.encode(list(seen)), np.array([log_loss(each) for each in seen.values()]), random)
            parents = sorted(seen.values(), key=lambda each: badness(problem, each))[: self.batch]
            candidates: dict[Plan, None] = {}
            for index in range(self.candidates):
                parent = parents[index % len(parents)].plan
                child = budget.mutated(parent, random, changes=int(random.integers(1, 3)))
                if child not in seen:
                    candidates.setdefault(child)
            if not candidates:
                candidates.setdefault(budget.random(random))
            plans = list(candidates)
            predicted_MN = ensemble.predict(paths.encode(plans))
            drawn_N = random.normal(predicted_MN.mean(0), predicted_MN.std(0))
            told = yield [plans[index] for index in drawn_N.argsort()[: self.batch]]
