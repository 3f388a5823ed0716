"""What optimizers share: plans are asked about once, many on few tokens, the best of them on more."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence

import numpy as np

from llmcompress.plan_search.optimizers.base import Optimizer, Proposals
from llmcompress.plan_search.optimizers.budget import Budget
from llmcompress.plan_search.plan_space import Plan
from llmcompress.plan_search.problem import Outcome, Problem, Proposal, exceeded

Asking = Generator[Sequence[Proposal], Sequence[Outcome], list[Outcome]]
Exploration = Generator[Sequence[Plan], Sequence[Outcome], None]
"""Yields plans; is sent their outcomes on the tokens of the first stage."""

IDLE = 50
"""Rounds without a new plan after which an exploration has nothing left to try."""


class Judge:
    """Remembers what was found of each plan on each number of tokens."""

    def __init__(self) -> None:
        self._known: dict[Proposal, Outcome] = {}

    def new(self, proposals: Sequence[Proposal]) -> list[Proposal]:
        """Those that nothing is known about, each once."""
        return [each for each in dict.fromkeys(proposals) if each not in self._known]

    def ask(self, proposals: Sequence[Proposal]) -> Asking:
        """The outcomes of all of them; only new ones are proposed."""
        new = self.new(proposals)
        if new:
            told = yield new
            self._known.update(zip(new, told, strict=True))
        return [self._known[each] for each in proposals]

    @property
    def count(self) -> int:
        """How many outcomes it remembers."""
        return len(self._known)

    def known(self, tokens: int) -> list[Outcome]:
        """All outcomes on so many tokens."""
        return [outcome for proposal, outcome in self._known.items() if proposal.tokens == tokens]


def badness(problem: Problem, outcome: Outcome) -> tuple[bool, float, float]:
    """Sorts outcomes: those that failed come last, before them those that exceed limits, then the loss counts.

    Source: Deb, An efficient constraint handling method for genetic algorithms, 2000.
    """
    costs = {**problem.cost(outcome.plan), **outcome.costs}
    return not outcome.is_valid, exceeded(costs, problem.limits), outcome.loss


def best(problem: Problem, outcomes: Sequence[Outcome], count: int) -> list[Outcome]:
    """The best so many, each plan once."""
    unique = {outcome.plan: outcome for outcome in outcomes}
    return sorted(unique.values(), key=lambda outcome: badness(problem, outcome))[:count]


def later_stages(problem: Problem, trials: int) -> list[tuple[int, int]]:
    """Tokens and number of plans of all stages but the first: a tenth of the trials, then a quarter of those before."""
    counts = [max(1, round(trials * 0.1 / 4**stage)) for stage in range(len(problem.stages) - 1)]
    return list(zip(problem.stages[1:], counts, strict=True)) if sum(counts) < trials else []


class Explorer(Optimizer):
    """An optimizer that judges all plans on the first stage's tokens; at the end the best are judged on more."""

    @abstractmethod
    def explore(self, problem: Problem, random: np.random.Generator) -> Exploration:
        """The algorithm. Plans that were judged before take no trial."""

    def proposals(self, problem: Problem, random: np.random.Generator) -> Proposals:
        """What `explore` yields until its trials are used, then the best of it on the tokens of later stages."""
        judge, later = Judge(), later_stages(problem, self.trials)
        if (closest := hopeless(problem)) is not None:
            yield from judge.ask([Proposal(closest, problem.stages[0])])
            return
        left = self.trials - sum(count for _, count in later)
        first, steps, idle = problem.stages[0], self.explore(problem, random), 0
        told: Sequence[Outcome] | None = None
        while left > 0 and idle < IDLE:
            try:
                plans = next(steps) if told is None else steps.send(told)
            except StopIteration:
                break
            asked = [Proposal(problem.space.canonical(plan), first) for plan in plans]
            new = judge.new(asked)
            idle = 0 if new else idle + 1
            if len(new) > left:
                yield from judge.ask(new[:left])
                break
            told = yield from judge.ask(asked)
            left -= len(new)
        found = judge.known(first)
        for tokens, count in later:
            found = yield from judge.ask([Proposal(each.plan, tokens) for each in best(problem, found, count)])


def hopeless(problem: Problem) -> Plan | None:
    """The plan that exceeds the limits least, where every plan exceeds them: there is nothing to search."""
    budget = Budget(problem)
    return None if budget.has_plans else budget.nearest


def beginning(problem: Problem, budget: Budget, random: np.random.Generator, count: int) -> list[Plan]:
    """So many plans that fit: the problem's own, then others at random; fewer where there are no more."""
    found = dict.fromkeys(budget.starts())
    for _ in range(20 * count):
        if len(found) >= count:
            break
        found.setdefault(budget.random(random))
    return list(found)[:count]
