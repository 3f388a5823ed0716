"""The end of a search: the best plans on the most text beside uniform ones, and everything found as a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmcompress.evaluation.environment import machine, versions
from llmcompress.plan_search.bench_judge import BenchJudge
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.problem import Outcome, Problem, Proposal, exceeded
from llmcompress.plan_search.selection import LOSS, better_uniform, comparable, front, hypervolume
from llmcompress.plan_search.settings import SearchSettings
from llmcompress.plan_search.trials import Finished
from llmcompress.records.search import Difference, SearchReport, SearchTrial


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found, in terms of plans."""

    problem: Problem
    uniform: Mapping[str, Plan]
    """Option → its plan."""
    trials: Sequence[Finished]
    front: Sequence[Outcome]
    """By loss, on the most tokens."""
    ordered: Sequence[Outcome]
    """The same, the selected one first."""
    nearest: Outcome | None
    """What exceeds the limits least, where nothing keeps them."""

    @property
    def selected(self) -> Outcome | None:
        """None: no plan keeps the limits."""
        return self.ordered[0] if self.ordered else None

    @property
    def rivals(self) -> list[Outcome]:
        """What was found of uniform plans, on few tokens and on many."""
        return [each.outcome for each in self.trials if each.outcome.plan in self.uniform.values()]

    def number(self, outcome: Outcome) -> int:
        """Of the trial."""
        same = (each.number for each in self.trials if _is(each.outcome, outcome))
        return next(same)

    def name_of_uniform(self, plan: Plan) -> str | None:
        """The option that all linears have; None: they have different ones."""
        return next((name for name, each in self.uniform.items() if each == plan), None)


def promoted(
    problem: Problem, outcomes: Sequence[Outcome], uniform: Mapping[str, Plan], *, count: int
) -> list[Proposal]:
    """What is judged on the most tokens at the end: the best plans, others of the front, and all uniform plans."""
    first, last = problem.stages[0], problem.stages[-1]
    kept = [each for each in outcomes if each.is_valid and exceeded(each.costs, problem.limits) == 0.0]
    few = [each for each in kept if each.tokens == first]
    by_loss = sorted(few, key=lambda each: each.loss)
    spread = front(few, [LOSS, *problem.costs])
    places = np.linspace(0, max(len(spread) - 1, 0), min(len(spread), count)).round().astype(int)
    wanted = [*by_loss[: -(-count // 2)], *(spread[place] for place in places.tolist())]
    plans = dict.fromkeys(each.plan for each in wanted)
    most = [each.plan for each in kept if each.tokens == last]
    return [Proposal(plan, last) for plan in dict.fromkeys([*list(plans)[:count], *most, *uniform.values()])]


def found_of(
    problem: Problem, settings: SearchSettings, uniform: Mapping[str, Plan], trials: Sequence[Finished]
) -> Found:
    """The front of everything that was judged, and what the settings select."""
    outcomes = [each.outcome for each in trials]
    kept = comparable(outcomes, problem.limits)
    (rule,) = settings.select
    valid = [each for each in outcomes if each.is_valid]
    nearest = None if kept else min(valid, key=lambda each: exceeded(each.costs, problem.limits), default=None)
    return Found(
        problem=problem,
        uniform=uniform,
        trials=trials,
        front=front(kept, [LOSS, *problem.costs]),
        ordered=rule.ordered(kept, problem.limits) if kept else (),
        nearest=nearest,
    )


def beside_uniform(found: Found, judge: BenchJudge) -> dict[int, Difference]:
    """Every uniform plan's loss minus that of the selected one, window by window."""
    chosen = found.selected
    if chosen is None:
        return {}
    ours = judge.windows(chosen.plan, chosen.tokens)
    differences = {}
    for each in found.rivals:
        if each.is_valid and each.tokens == chosen.tokens and each.plan != chosen.plan:
            other = judge.windows(each.plan, chosen.tokens) - ours
            error = float(other.std() / len(other) ** 0.5) if len(other) > 1 else 0.0
            differences[found.number(each)] = Difference(mean=float(other.mean()), standard_error=error)
    return differences


def report_of(
    found: Found,
    settings: SearchSettings,
    *,
    folder: str,
    dense: Mapping[str, float],
    differences: Mapping[int, Difference],
    notes: Sequence[str] = (),
) -> SearchReport:
    """Everything as plain data."""
    problem, space = found.problem, found.problem.space
    chosen, (optimizer,) = found.selected, settings.optimizer
    better = None if chosen is None else better_uniform(chosen, found.rivals)
    start = min((each.began for each in found.trials), default=0.0)
    return SearchReport(
        model=str(settings.model),
        folder=folder,
        optimizer=type(optimizer).__name__,
        axes=tuple(problem.costs),
        limits=dict(problem.limits),
        dense=dict(dense),
        units={space.units[index].label: space.units[index].options for index in space.free},
        plans=space.size,
        trials=tuple(_trial(found, each, start) for each in found.trials),
        front=tuple(found.number(each) for each in found.front),
        selected=None if chosen is None else found.number(chosen),
        nearest=None if found.nearest is None else found.number(found.nearest),
        better_uniform=None if better is None else found.number(better),
        beside_uniform=dict(differences),
        importance=importance(space, [each.outcome for each in found.trials]),
        hypervolume=growth(problem, found.trials),
        settings=settings.to_yaml(),
        versions=versions(),
        machine=machine(),
        notes=tuple(notes),
    )


def importance(space: PlanSpace, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Unit → the share of the variance of log losses that lies between its options: its main effect.

    Over what was judged on the fewest tokens, which an optimizer did not draw at random: a hint, no measurement.
    """
    valid = [each for each in outcomes if each.is_valid and each.loss > 0]
    few = [each for each in valid if each.tokens == min(one.tokens for one in valid)]
    losses = np.log([each.loss for each in few])
    total = float(losses.var()) if len(few) > 1 else 0.0
    if total <= 0.0:
        return {}
    found = {}
    for index in space.free:
        chosen = np.array([each.plan[index] for each in few])
        groups = [losses[chosen == option] for option in set(chosen.tolist())]
        between = sum(len(group) * (group.mean() - losses.mean()) ** 2 for group in groups) / len(few)
        found[space.units[index].label] = float(between) / total
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def growth(problem: Problem, trials: Sequence[Finished]) -> tuple[tuple[int, float], ...]:
    """How the front grew: its hypervolume in the plane of loss and first cost, as a share of what it is at the end."""
    axis = next(iter(problem.costs), None)
    valid = [each.outcome for each in trials if each.outcome.is_valid]
    few = [each for each in valid if each.tokens == min(one.tokens for one in valid)]
    if axis is None or len(few) < 2:
        return ()
    reference = {LOSS: max(each.loss for each in few), axis: max(each.costs[axis] for each in few)}
    whole = hypervolume(few, reference)
    step = max(1, len(few) // 100)
    counts = [*range(1, len(few), step), len(few)]
    return tuple((count, hypervolume(few[:count], reference) / whole if whole else 0.0) for count in counts)


def _trial(found: Found, each: Finished, start: float) -> SearchTrial:
    space, outcome = found.problem.space, each.outcome
    return SearchTrial(
        number=each.number,
        chosen={space.units[index].label: space.units[index].options[outcome.plan[index]] for index in space.free},
        tokens=outcome.tokens,
        loss=outcome.loss if outcome.is_valid else None,
        costs=dict(outcome.costs),
        problem=outcome.problem,
        uniform=found.name_of_uniform(outcome.plan),
        worker=each.worker,
        began=each.began - start,
        seconds=each.seconds,
    )


def _is(one: Outcome, other: Outcome) -> bool:
    return one.plan == other.plan and one.tokens == other.tokens
