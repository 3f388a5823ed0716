"""`Budget`: the costs of many plans at once, and moves that bring plans within the limits and use what is left.

N = plans, U = units, O = options, A = limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np

from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.optimizers.additive_optimum import nearest
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.problem import ROUNDING, Problem

_ILLEGAL = 1e6
"""More than any plan exceeds its limits by."""


class Totals:
    """`Additive.total` of many plans at once."""

    def __init__(self, space: PlanSpace, each: Additive) -> None:
        units, bodies = space.units, len(space.space.bodies)
        most = max(len(unit.options) for unit in units)
        self._base = each.base
        self._unit = np.arange(len(units))
        self._body_of = np.array([index if unit.body is None else unit.body for index, unit in enumerate(units)])
        self._is_site = np.array([unit.body is not None for unit in units])
        self._table = np.zeros((len(units), bodies + 1, most))  # the last body is `dropped`: nothing
        for index, row_O in each.of_unit.items():
            self._table[index, :, : row_O.size] = row_O
        for index, of_BO in each.of_sites.items():
            self._table[index, :bodies, : of_BO.shape[1]] = of_BO

    def of(self, plans_NU: np.ndarray) -> np.ndarray:
        """One number per plan."""
        body_NU = np.where(self._is_site, plans_NU[:, self._body_of], 0)
        return np.asarray(self._base + self._table[self._unit, body_NU, plans_NU].sum(1))


class Budget:
    """The limits of a problem. Where there are none every legal plan fits."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.space = problem, problem.space
        self.free = np.array(self.space.free, dtype=int)
        self._limits = {axis: limit for axis, limit in problem.limits.items() if axis in problem.costs}
        first = (0,) * len(self.space.units)
        scale = self._limits or {axis: each.total(self.space, first) or 1.0 for axis, each in problem.costs.items()}
        self._totals: Mapping[str, tuple[Totals, float]] = {
            axis: (Totals(self.space, problem.costs[axis]), limit) for axis, limit in scale.items()
        }
        self._bodies = np.array(self.space.bodies, dtype=int)
        self._blocks_of = np.array([len(self.space.units[body].blocks) for body in self.space.bodies])
        self._dropped = len(self.space.space.bodies)

    def shares(self, plans_NU: np.ndarray) -> np.ndarray:
        """N × A: every cost by its limit."""
        found = [totals.of(plans_NU) / limit for totals, limit in self._totals.values()]
        return np.stack(found, 1) if found else np.zeros((len(plans_NU), 0))

    def spent(self, plans_NU: np.ndarray) -> np.ndarray:
        """The sum of these shares: what orders the options of a unit from cheap to dear."""
        return np.asarray(self.shares(plans_NU).sum(1))

    def excess(self, plans_NU: np.ndarray) -> np.ndarray:
        """By which share limits are exceeded, summed; plans that are not legal exceed them by far."""
        over_NA = self.shares(plans_NU) - 1.0
        over_N = np.where(over_NA > ROUNDING, over_NA, 0.0).sum(1) if self._limits else np.zeros(len(plans_NU))
        gone_N = ((plans_NU[:, self._bodies] == self._dropped) * self._blocks_of).sum(1)
        blocks = len(self.space.model_map.blocks)
        most = min(math.floor(self.space.space.most_dropped * blocks + 1e-9), blocks - 1)
        return np.asarray(over_N + _ILLEGAL * np.maximum(gone_N - most, 0))

    def variants(self, plan_U: np.ndarray, unit: int) -> np.ndarray:
        """O × U: the plan with every option of one unit."""
        found = np.repeat(plan_U[None], len(self.space.units[unit].options), 0)
        found[:, unit] = np.arange(len(found))
        return found

    def ladder(self, plan: Plan, unit: int) -> list[int]:
        """Options of a unit from cheap to dear, where the rest of the plan stays."""
        spent_O = self.spent(self.variants(np.array(plan), unit))
        return [int(option) for option in np.argsort(spent_O, kind="stable")]

    def fits(self, plan: Plan) -> bool:
        """Whether it is legal and keeps all limits."""
        return bool(self.excess(np.array([plan]))[0] == 0.0)

    @cached_property
    def nearest(self) -> Plan:
        """The plan that exceeds the limits least."""
        return nearest(self.problem)

    def repaired(self, plan: Plan, random: np.random.Generator) -> Plan:
        """The plan with cheaper options, one step down at a time in units drawn at random, until it fits.

        Where such steps lead nowhere it is the plan nearest to the limits, which may exceed them where all do.
        """
        current_U, progress = np.array(plan), True
        while progress:
            progress = False
            for unit in random.permutation(self.free):
                excess_O = self.excess(self.variants(current_U, int(unit)))
                now = excess_O[current_U[unit]]
                if now == 0.0:
                    return self._plan(current_U)
                below = np.flatnonzero(excess_O < now)
                if below.size:
                    current_U[unit] = below[excess_O[below].argmax()]
                    progress = True
        if self.excess(current_U[None])[0] == 0.0:
            return self._plan(current_U)
        return self.nearest

    def filled(self, plan: Plan, random: np.random.Generator) -> Plan:
        """The plan with dearer options that still fit, in units drawn at random: what is left of the limits is used."""
        if not self._limits:
            return self.space.canonical(plan)
        current_U = np.array(plan)
        for unit in random.permutation(self.free):
            tried = self.variants(current_U, int(unit))
            spent_O = self.spent(tried)
            dearer = np.flatnonzero((self.excess(tried) == 0.0) & (spent_O > spent_O[current_U[unit]]))
            if dearer.size:
                current_U[unit] = int(random.choice(dearer))
        return self._plan(current_U)

    def within(self, plan: Plan, random: np.random.Generator) -> Plan:
        """The plan brought within the limits, and what is left of them used."""
        return self.filled(self.repaired(plan, random), random)

    def random(self, random: np.random.Generator) -> Plan:
        """Any plan that fits and uses its limits."""
        return self.within(self.space.random(random), random)

    def active(self, plan: Plan) -> np.ndarray:
        """Units with a choice that counts: those inside dropped blocks have none."""
        units, dropped = self.space.units, self.space.is_dropped
        counts = [unit for unit in self.free if (body := units[unit].body) is None or not dropped(plan, body)]
        return np.array(counts, dtype=int)

    def mutated(self, plan: Plan, random: np.random.Generator, *, changes: int = 1) -> Plan:
        """The plan with other options in so many units drawn at random, brought within the limits."""
        found = list(plan)
        active = self.active(plan)
        for unit in random.choice(active, size=min(changes, active.size), replace=False):
            others = [option for option in range(len(self.space.units[unit].options)) if option != plan[unit]]
            found[unit] = int(random.choice(others))
        return self.within(tuple(found), random)

    @cached_property
    def has_plans(self) -> bool:
        """Whether any plan fits."""
        return self.fits(self.repaired((0,) * len(self.space.units), np.random.default_rng(0)))

    def starts(self) -> Iterator[Plan]:
        """The problem's plans to begin with that fit, each once."""
        found = dict.fromkeys(self.space.canonical(plan) for plan in self.problem.starts)
        return (plan for plan in found if self.fits(plan))

    def _plan(self, plan_U: np.ndarray) -> Plan:
        return self.space.canonical(tuple(int(option) for option in plan_U))
