"""KL sensitivity: what every option of every unit costs while all other units are as in one plan."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.proxies.base import Judge


def kl_sensitivity(judge: Judge, space: PlanSpace, tokens: int, *, around: Plan | None = None) -> Additive:
    """The loss as a sum: that of one plan, and of every other option the difference that it alone makes.

    `around`: the plan that all others are compared with; by default the first option of every unit. A sites' option is
    judged in the body of that plan, and counts the same in all bodies; in a dropped block it counts nothing. Takes as
    many judgements as `single_changes` has plans, in model order, so that a bench computes what they share once.
    """
    base = space.canonical(around or (0,) * len(space.units))
    start = judge.loss(base, tokens)
    rises = {(unit, choice): judge.loss(plan, tokens) - start for unit, choice, plan in single_changes(space, base)}
    of_unit, of_sites = {}, {}
    bodies = len(space.space.bodies)
    for index, unit in enumerate(space.units):
        rise_C = np.array([rises.get((index, choice), 0.0) for choice in range(len(unit.options))])
        if unit.body is None:
            of_unit[index] = rise_C
        else:
            of_sites[index] = np.tile(rise_C, (bodies, 1))
    return Additive(start, of_unit, of_sites)


def single_changes(space: PlanSpace, base: Plan) -> Iterator[tuple[int, int, Plan]]:
    """Unit, option and plan: everything that differs from `base` in one unit. Of sites in dropped blocks: nothing."""
    for index in space.free:
        for choice in range(len(space.units[index].options)):
            plan = space.canonical((*base[:index], choice, *base[index + 1 :]))
            if plan != base:
                yield index, choice, plan
