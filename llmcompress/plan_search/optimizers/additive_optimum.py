"""The plan of least summed loss within the limits: by dynamic programming for one limit, as an integer program for any.

S = states of the table, B = bodies, O = options.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.problem import ROUNDING, Problem, exceeded

MOST_STATES = 1 << 14
"""Of the table, for each number of dropped blocks; above it the limit is cut into so many steps, and the best of each
stays."""

_STEPS = 1 << 12


def least_loss(
    space: PlanSpace, losses: Additive, costs: Mapping[str, Additive], limits: Mapping[str, float]
) -> Plan | None:
    """The plan of least loss that keeps all limits; None: none does.

    With several limits it is an integer program, with one a table of what costs how much (a multiple-choice knapsack
    whose items are blocks with all their bodies).
    """
    bound = {axis: limit for axis, limit in limits.items() if axis in costs}
    if len(bound) == 1:
        ((axis, limit),) = bound.items()
        return by_table(space, losses, costs[axis], limit)
    return by_integer_program(space, losses, costs, bound)


@dataclass(frozen=True)
class _States:
    """Partial plans, none of which is dearer and worse than another; `choices` are those of some units."""

    cost: np.ndarray
    loss: np.ndarray
    gone: np.ndarray
    """Blocks that are dropped."""
    choices: np.ndarray
    """S × units."""

    def plus(self, other: _States, most: float, most_gone: int) -> _States:
        """All pairs that cost at most `most`, without those that another beats."""
        cost = (self.cost[:, None] + other.cost).ravel()
        gone = (self.gone[:, None] + other.gone).ravel()
        loss = (self.loss[:, None] + other.loss).ravel()
        kept = _unbeaten(cost, loss, gone, np.flatnonzero((cost <= most) & (gone <= most_gone)), most)
        mine, theirs = np.divmod(kept, other.cost.size)
        return _States(cost[kept], loss[kept], gone[kept], self.choices[mine] + other.choices[theirs])


def _unbeaten(cost: np.ndarray, loss: np.ndarray, gone: np.ndarray, among: np.ndarray, most: float) -> np.ndarray:
    """Indices of states that no state with as many dropped blocks beats in both."""
    found = []
    for count in np.flatnonzero(np.bincount(gone[among])):
        these = _not_beaten_by_cheaper_steps(cost, loss, among[gone[among] == count])
        order = these[np.lexsort((loss[these], cost[these]))]
        best = np.minimum.accumulate(loss[order])
        order = order[np.concatenate([[True], best[1:] < best[:-1]])] if order.size else order
        if order.size > MOST_STATES and math.isfinite(most):  # the last of a step of costs is its best
            step = np.ceil(cost[order] / (most / MOST_STATES))
            order = order[np.concatenate([step[1:] != step[:-1], [True]])]
        found.append(order)
    return np.concatenate(found) if found else among


def _not_beaten_by_cheaper_steps(cost: np.ndarray, loss: np.ndarray, these: np.ndarray) -> np.ndarray:
    """Without most of those that another beats, in linear time: sorting all pairs would take most of a search."""
    if these.size <= _STEPS:
        return these
    low, high = float(cost[these].min()), float(cost[these].max())
    step = ((cost[these] - low) * (_STEPS / (high - low or 1.0))).astype(np.int64)
    least = np.full(_STEPS + 1, np.inf)
    np.minimum.at(least, step, loss[these])
    cheaper = np.concatenate([[np.inf], np.minimum.accumulate(least)[:-1]])
    return np.asarray(these[loss[these] < cheaper[step]])


def by_table(space: PlanSpace, losses: Additive, cost: Additive, limit: float) -> Plan | None:
    """The least loss within one limit, exactly while the table stays below `MOST_STATES`."""
    blocks = len(space.model_map.blocks)
    most_gone = min(math.floor(space.space.most_dropped * blocks + 1e-9), blocks - 1)
    width, most = len(space.units), limit - cost.base  # sums here end in other digits than `Additive.total`
    items = [_item(space, losses, cost, index) for index, unit in enumerate(space.units) if unit.body is None]
    rest = np.cumsum([0.0, *(each.cost.min() for each in reversed(items))])[::-1]
    found = _States(np.zeros(1), np.zeros(1), np.zeros(1, dtype=int), np.zeros((1, width), dtype=np.int16))
    for each, later in zip(items, rest[1:], strict=True):
        found = found.plus(each, most - later + ROUNDING * abs(limit), most_gone)
        if not found.cost.size:
            return None
    plan = found.choices[found.loss.argmin()]
    return space.canonical(tuple(int(choice) for choice in plan))


def _item(space: PlanSpace, losses: Additive, cost: Additive, index: int) -> _States:
    """All that can be chosen for one unit; for a body with everything inside its blocks."""
    unit, width = space.units[index], len(space.units)
    options = len(unit.options)
    nothing = np.zeros(options)
    cost_O, loss_O = cost.of_unit.get(index, nothing), losses.of_unit.get(index, nothing)
    choices = np.zeros((options, width), dtype=np.int16)
    choices[:, index] = np.arange(options)
    if unit.kind != "body":
        return _States(cost_O, loss_O, np.zeros(options, dtype=int), choices)
    parts = []
    for body in range(options):
        one = slice(body, body + 1)
        gone = len(unit.blocks) if body >= len(space.space.bodies) else 0
        states = _States(cost_O[one], loss_O[one], np.array([gone]), choices[one])
        for site in () if gone else space.inside(index):
            inner = np.zeros((len(space.units[site].options), width), dtype=np.int16)
            inner[:, site] = np.arange(len(inner))
            level = _States(
                cost.of_sites[site][body], losses.of_sites[site][body], np.zeros(len(inner), dtype=int), inner
            )
            states = states.plus(level, math.inf, len(unit.blocks))
        parts.append(states)
    joined = [np.concatenate([getattr(each, name) for each in parts]) for name in ("cost", "loss", "gone", "choices")]
    kept = _unbeaten(joined[0], joined[1], joined[2], np.arange(joined[0].size), math.inf)
    return _States(joined[0][kept], joined[1][kept], joined[2][kept], joined[3][kept])


class _Program:
    """A plan as 0/1 variables: options of units, and for sites pairs of body and option, which sum to the body's."""

    def __init__(self, space: PlanSpace) -> None:
        self.space, self._bodies = space, len(space.space.bodies)
        self._start, count = [], 0
        for unit in space.units:
            self._start.append(count)
            count += len(unit.options) * (1 if unit.body is None else self._bodies)
        self.count = count

    def row(self, each: Additive) -> np.ndarray:
        """The coefficients of a sum over units."""
        found = np.zeros(self.count)
        for index, unit in enumerate(self.space.units):
            values = each.of_unit.get(index) if unit.body is None else each.of_sites[index].ravel()
            if values is not None:
                found[self._start[index] : self._start[index] + values.size] = values
        return found

    def choose_once(self, more: int) -> LinearConstraint:
        """One option per unit, for sites one if their block has that body; no more blocks dropped than may be.

        `more`: variables that stand behind these.
        """
        rows = sum(1 if unit.body is None else self._bodies for unit in self.space.units)
        matrix, low, high = lil_array((rows + 1, self.count + more)), np.zeros(rows + 1), np.zeros(rows + 1)
        row = 0
        for index, unit in enumerate(self.space.units):
            start, options = self._start[index], len(unit.options)
            for body in range(1 if unit.body is None else self._bodies):
                matrix[row, start + body * options : start + (body + 1) * options] = 1.0
                if unit.body is None:
                    low[row] = high[row] = 1.0
                else:
                    matrix[row, self._start[unit.body] + body] = -1.0
                row += 1
        for index in self.space.bodies:
            if len(self.space.units[index].options) > self._bodies:
                matrix[row, self._start[index] + self._bodies] = len(self.space.units[index].blocks)
        blocks = len(self.space.model_map.blocks)
        high[row] = min(math.floor(self.space.space.most_dropped * blocks + 1e-9), blocks - 1)
        return LinearConstraint(matrix.tocsr(), low, high)

    def plan(self, values: np.ndarray) -> Plan:
        """The options that are chosen."""
        found = []
        for index, unit in enumerate(self.space.units):
            start, options = self._start[index], len(unit.options)
            taken = values[start : start + options * (1 if unit.body is None else self._bodies)]
            found.append(int(taken.argmax()) % options)
        return self.space.canonical(tuple(found))


def by_integer_program(
    space: PlanSpace, losses: Additive, costs: Mapping[str, Additive], limits: Mapping[str, float]
) -> Plan | None:
    """The least loss within any number of limits, by branch and bound (HiGHS)."""
    program = _Program(space)
    row = program.row(losses)
    for slack in (0.0, 2e-6, 1e-5):  # the solver's constraints hold up to 1e-6
        keep = [
            LinearConstraint(program.row(costs[axis])[None] / limit, -np.inf, 1.0 - slack - costs[axis].base / limit)
            for axis, limit in limits.items()
        ]
        found = milp(
            row / (np.abs(row).max() or 1.0),
            integrality=np.ones(program.count),
            bounds=Bounds(0, 1),
            constraints=[program.choose_once(0), *keep],
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            return None
        plan = program.plan(found.x)
        if not exceeded({axis: costs[axis].total(space, plan) for axis in limits}, limits):
            return plan
    return None


def nearest(problem: Problem) -> Plan:
    """The plan that exceeds the limits by the least summed share: one that fits, where there is one."""
    limits = {axis: limit for axis, limit in problem.limits.items() if axis in problem.costs}
    program, more = _Program(problem.space), len(limits)
    keep = []
    for place, (axis, limit) in enumerate(limits.items()):
        over = np.zeros(more)
        over[place] = -1.0
        row = np.concatenate([program.row(problem.costs[axis]) / limit, over])
        keep.append(LinearConstraint(row[None], -np.inf, 1.0 - problem.costs[axis].base / limit))
    found = milp(
        np.concatenate([np.zeros(program.count), np.ones(more)]),
        integrality=np.concatenate([np.ones(program.count), np.zeros(more)]),
        bounds=Bounds(0, np.concatenate([np.ones(program.count), np.full(more, np.inf)])),
        constraints=[program.choose_once(more), *keep],
    )
    assert found.x is not None, "the plan without changes is legal"
    return program.plan(found.x)
