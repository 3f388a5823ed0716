"""BANANAS-like Bayesian optimization: an ensemble on paths, Thompson sampling, candidates by mutation."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from llmcompress.plan_search.encodings import PathEncoding
from llmcompress.plan_search.optimizers.base import OPTIMIZERS
from llmcompress.plan_search.optimizers.budget import Budget
from llmcompress.plan_search.optimizers.judging import Exploration, Explorer, badness, beginning
from llmcompress.plan_search.optimizers.optuna_samplers import log_loss
from llmcompress.plan_search.plan_space import Plan
from llmcompress.plan_search.problem import Outcome, Problem
from llmcompress.plan_search.proxies.predictors.base import PREDICTORS


@OPTIMIZERS.register("bananas")
class BANANAS(Explorer):
    """Mutations of the best plans so far; for each the ensemble draws a loss, and those of the least drawn are judged.

    Source: White et al., BANANAS, arXiv 1910.11858, algorithm 1: path encoding, 5 networks, independent Thompson
    sampling, mutated candidates, 10 plans per round.
    Differs: networks of two layers instead of ten, on pieces of paths; the log loss is predicted.
    """

    start: int = Field(default=20, ge=2)
    """Plans judged before the first ensemble: given ones that fit, and random ones."""
    predictor: str = "mlp"
    """What predicts the loss and says how sure it is: `mlp`, an ensemble, `gp` or `ridge`."""
    candidates: int = Field(default=100, ge=1)
    """Mutations that are predicted each round."""
    batch: int = Field(default=10, ge=1)
    """Plans judged each round."""

    def explore(self, problem: Problem, random: np.random.Generator) -> Exploration:
        """Round by round."""
        budget, paths = Budget(problem), PathEncoding(problem.space)
        predictor, seen = PREDICTORS[self.predictor](), dict[Plan, Outcome]()
        told = yield beginning(problem, budget, random, self.start)
        while told or seen:
            seen.update((each.plan, each) for each in told)
            losses_N = np.array([log_loss(each) for each in seen.values()])
            forecast = predictor.fitted(paths.encode(list(seen)), losses_N, seed=int(random.integers(1 << 20)))
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
            features_NP = paths.encode(plans)
            noise_N = random.standard_normal(len(plans))
            drawn_N = forecast.mean(features_NP) + noise_N * forecast.spread(features_NP)
            told = yield [plans[index] for index in drawn_N.argsort()[: self.batch]]
