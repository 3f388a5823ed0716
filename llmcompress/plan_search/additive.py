"""`Additive`: a number of every plan that is a sum over its units: bytes, seconds, an estimated loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmcompress.plan_search.plan_space import Plan, PlanSpace


@dataclass(frozen=True, eq=False)
class Additive:
    """What stays whatever is chosen, and what each choice adds. Units are named by their index in the space.

    What a linear takes depends on the body of its block; in a dropped block it takes nothing.
    """

    base: float
    of_unit: Mapping[int, np.ndarray]
    """Of units that are no sites: one number per option."""
    of_sites: Mapping[int, np.ndarray]
    """Of sites: bodies × options, all blocks of the unit together; bodies as in `space.bodies`, without `dropped`."""

    def total(self, space: PlanSpace, plan: Plan) -> float:
        """The sum for one plan."""
        found = self.base
        for index, (unit, choice) in enumerate(zip(space.units, plan, strict=True)):
            if unit.body is None:
                found += float(self.of_unit[index][choice]) if index in self.of_unit else 0.0
            elif not space.is_dropped(plan, unit.body):
                found += float(self.of_sites[index][plan[unit.body], choice])
        return found

    def plus(self, other: Additive, weight: float = 1.0) -> Additive:
        """The weighted sum of two."""
        units = self.of_unit.keys() | other.of_unit.keys()
        nothing = np.zeros(1)
        return Additive(
            self.base + weight * other.base,
            {unit: self.of_unit.get(unit, nothing) + weight * other.of_unit.get(unit, nothing) for unit in units},
            {unit: self.of_sites[unit] + weight * other.of_sites[unit] for unit in self.of_sites},
        )
