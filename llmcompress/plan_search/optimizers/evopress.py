"""EvoPress-like evolution: level swaps at a constant budget, and survivors of few tokens judged on more."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from llmcompress.plan_search.optimizers.base import OPTIMIZERS, Optimizer, Proposals
from llmcompress.plan_search.optimizers.budget import Budget
from llmcompress.plan_search.optimizers.judging import IDLE, Judge, beginning, best, hopeless
from llmcompress.plan_search.plan_space import Plan
from llmcompress.plan_search.problem import Outcome, Problem, Proposal

_MOST_CHANGES = 10
_LEAST_KEPT = 0.8
_TRIES = 200


@OPTIMIZERS.register("evopress")
class EvoPress(Optimizer):
    """One parent; its offspring have a few units raised by one level and others lowered until the limits are kept.

    Each generation is judged on the tokens of the first stage, survivors on those of the next; the parent joins at the
    last stage and stays unless one is better.
    Source: Sieberling et al., EvoPress, arXiv 2410.14649, algorithm 1; offspring, changes and the least of the budget
    that must be used again are those of its code.
    Differs: levels are all options of a unit in order of what they cost within all limits, bodies and dropping among
    them; all generations of a stage are judged on the same text, so that nothing is judged twice.
    """

    offspring: int = Field(default=16, ge=1)
    """Of each generation."""
    survivors: tuple[int, ...] = ()
    """How many survive each stage but the last, which one does. None: a quarter of those before, at least 1."""
    drawn: int = Field(default=16, ge=1)
    """Plans drawn at random in which the first parent is searched, where no given plan to begin with fits."""

    def proposals(self, problem: Problem, random: np.random.Generator) -> Proposals:
        """Generation by generation."""
        budget, judge = Budget(problem), Judge()
        if (closest := hopeless(problem)) is not None:
            yield from judge.ask([Proposal(closest, problem.stages[0])])
            return
        starts = list(budget.starts()) or beginning(problem, budget, random, self.drawn)
        filled = dict.fromkeys([*starts, *(budget.filled(plan, random) for plan in starts)])
        told = yield from judge.ask([Proposal(plan, problem.stages[0]) for plan in filled])
        (parent,) = (each.plan for each in best(problem, told, 1))
        idle = 0
        while idle < IDLE and (children := self._offspring(parent, budget, random)):
            known = judge.count
            plans: list[Plan] = children
            outcomes: list[Outcome] = []
            for stage, (tokens, count) in enumerate(zip(problem.stages, self._survivors(problem), strict=True)):
                if stage == len(problem.stages) - 1:
                    plans = [*plans, parent]
                outcomes = yield from judge.ask([Proposal(plan, tokens) for plan in plans])
                plans = [each.plan for each in best(problem, outcomes, count)]
            parent = plans[0]
            idle = 0 if judge.count > known else idle + 1

    def _survivors(self, problem: Problem) -> list[int]:
        before_last = len(problem.stages) - 1
        counts = self.survivors or tuple(max(1, self.offspring // 4 ** (stage + 1)) for stage in range(before_last))
        return [*[*counts, *(1 for _ in range(before_last))][:before_last], 1]

    def _offspring(self, parent: Plan, budget: Budget, random: np.random.Generator) -> list[Plan]:
        found: dict[Plan, None] = {}
        for _ in range(_TRIES * self.offspring):
            if len(found) == self.offspring:
                break
            child = swapped(parent, budget, random)
            if child is not None and child != parent:
                found.setdefault(child)
        return list(found)


def swapped(parent: Plan, budget: Budget, random: np.random.Generator) -> Plan | None:
    """The parent with 1 to 3 units one level up, then others one level down until it fits; None: too much changed.

    Where blocks may be dropped, half of the steps up exchange the body of a dropped block and that of another.
    """
    child, spent = parent, float(budget.spent(np.array([parent]))[0])
    raised = int(min(random.integers(1, 4), random.integers(1, 4)))
    for _ in range(raised):
        exchanges = budget.space.dropped(child) and random.random() < 0.5
        child = _exchanged(child, budget, random) if exchanges else _moved(child, budget, random, 1)
    top = float(budget.spent(np.array([child]))[0])
    changes = raised
    while not budget.fits(child):
        changes += 1
        if changes > _MOST_CHANGES:
            return None
        child = _moved(child, budget, random, -1)
    child = budget.space.canonical(child)
    added, removed = top - spent, top - float(budget.spent(np.array([child]))[0])
    if removed > 0 and added / removed < _LEAST_KEPT:
        return None
    return child


def _exchanged(plan: Plan, budget: Budget, random: np.random.Generator) -> Plan:
    """A dropped block and another, each with the body of the other."""
    space, found = budget.space, list(plan)
    gone = [body for body in space.bodies if space.is_dropped(plan, body)]
    kept = [body for body in space.bodies if not space.is_dropped(plan, body)]
    one, other = gone[int(random.integers(len(gone)))], kept[int(random.integers(len(kept)))]
    found[one], found[other] = plan[other], plan[one]
    for site, whose in zip(space.inside(one), space.inside(other), strict=False):
        found[site] = plan[whose] if space.units[site].options == space.units[whose].options else found[site]
    return tuple(found)


def _moved(plan: Plan, budget: Budget, random: np.random.Generator, step: int) -> Plan:
    """One unit, drawn among those that can move, one level up or down."""
    for unit in random.permutation(budget.active(plan)):
        ladder = budget.ladder(plan, int(unit))
        place = ladder.index(plan[unit]) + step
        if 0 <= place < len(ladder):
            return (*plan[:unit], ladder[place], *plan[unit + 1 :])
    return plan
