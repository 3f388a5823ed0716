"""Shells: plans that use each option equally often cost the same; one of each shell is judged first."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
from pydantic import Field

from llmcompress.plan_search.optimizers.base import OPTIMIZERS
from llmcompress.plan_search.optimizers.budget import Budget
from llmcompress.plan_search.optimizers.judging import Exploration, Explorer, badness, beginning
from llmcompress.plan_search.plan_space import Plan
from llmcompress.plan_search.problem import Outcome, Problem


@OPTIMIZERS.register("shells")
class Shells(Explorer):
    """A property search first: one plan for every class of equal totals; then plans within the best classes.

    Source: Jin et al. and Wan et al. search abstract properties before architectures; here the property is how often
    each option is used in linears of each kind (`PlanSpace.shell`).
    Differs: of a shell the plan of least estimated loss among those drawn stands for it, where losses are estimated.
    """

    share: float = Field(default=0.5, gt=0, lt=1)
    """Of the trials, for the first look at shells."""
    best: int = Field(default=4, ge=1)
    """Shells that plans are then drawn from."""
    drawn: int = Field(default=20, ge=1)
    """Plans drawn for each one that is judged."""

    def explore(self, problem: Problem, random: np.random.Generator) -> Exploration:
        """One plan per shell, then exchanges within the best shells, with a few steps into others."""
        budget, space = Budget(problem), problem.space
        members: dict[Hashable, list[Plan]] = {}
        wanted = max(1, int(self.trials * self.share))
        for plan in beginning(problem, budget, random, wanted * self.drawn // 4):
            members.setdefault(space.shell(plan), []).append(plan)
        first = [min(plans, key=lambda plan: self._estimate(plan, problem)) for plans in members.values()]
        known: dict[Plan, Outcome] = {}
        told = yield sorted(first, key=lambda plan: self._estimate(plan, problem))[:wanted]
        while True:
            known.update((each.plan, each) for each in told)
            ranked = sorted(known.values(), key=lambda each: badness(problem, each))
            tops = {space.shell(each.plan): each.plan for each in reversed(ranked[: 4 * self.best])}
            parents = list(reversed(tops.values()))[: self.best]
            told = yield [self._next(parent, budget, random, known, problem) for parent in parents]

    def _estimate(self, plan: Plan, problem: Problem) -> float:
        return 0.0 if problem.losses is None else problem.losses.total(problem.space, plan)

    def _next(
        self, parent: Plan, budget: Budget, random: np.random.Generator, known: dict[Plan, Outcome], problem: Problem
    ) -> Plan:
        """A plan of the same shell: two units of one kind exchange their choices. Where all are known: a mutation."""
        found = []
        for _ in range(self.drawn):
            plan = self._exchanged(parent, budget, random)
            if plan not in known and budget.fits(plan):
                found.append(plan)
        plans = found or [budget.mutated(parent, random)]
        return min(plans[: max(1, self.drawn // 4)], key=lambda plan: self._estimate(plan, problem))

    def _exchanged(self, plan: Plan, budget: Budget, random: np.random.Generator) -> Plan:
        units = budget.space.units
        one = int(random.choice(budget.free))
        alike = [
            other
            for other in budget.free
            if plan[other] != plan[one]
            and (units[other].kind, units[other].sites) == (units[one].kind, units[one].sites)
        ]
        if not alike:
            return plan
        other, found = int(random.choice(alike)), list(plan)
        found[one], found[other] = plan[other], plan[one]
        return budget.space.canonical(tuple(found))
