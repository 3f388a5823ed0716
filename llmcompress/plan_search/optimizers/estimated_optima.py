"""Plans of least estimated loss, for several exchange rates between what shapes lose and what bits lose."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.optimizers.additive_optimum import least_loss
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.space import DROPPED

RATES = ((1.0, 1.0), (math.inf, math.inf), (1.0, math.inf), (math.inf, 1.0), (2.0, 2.0), (4.0, 4.0), (0.5, 0.5))
"""What losses of narrow bodies, and of dropped blocks, are multiplied by; infinite: none is taken."""


class Optimum(NamedTuple):
    """A plan, and the exchange rates at which it is the least sum."""

    plan: Plan
    narrow: float
    dropped: float


def estimated_optima(
    space: PlanSpace, losses: Additive, costs: Mapping[str, Additive], limits: Mapping[str, float]
) -> Iterator[Optimum]:
    """The optimum of the losses as they are first, then others within the limits, each once.

    Errors of rounding and of missing channels add up with different errors: within one family the estimates order plans
    well, between families they are off by a common factor, which a few judged plans tell. The optima of the families
    alone are among them: where the joint optimum is judged worse than one of these, a search sees it.
    """
    found: dict[Plan, None] = {}
    for narrow, dropped in RATES if has_shapes(space) else RATES[:1]:
        factors = _factors(space, narrow, dropped)
        plan = least_loss(space, _scaled(losses, factors), costs, limits)
        # within some limits there is no plan but one with what was not to be taken
        if (
            plan is not None
            and plan not in found
            and all(np.isfinite(each[plan[body]]) for body, each in factors.items())
        ):
            found[plan] = None
            yield Optimum(plan, narrow, dropped)


def has_shapes(space: PlanSpace) -> bool:
    """Whether bodies may be narrowed or dropped: otherwise exchange rates change nothing."""
    return any(len(space.units[body].options) > 1 for body in space.bodies)


def halfway(found: Sequence[Optimum]) -> list[tuple[float, float]]:
    """Exchange rates between those of the first of these plans, the best, and the next rate on both sides: of narrow
    bodies, and of dropped blocks. Geometric means; where there is no next finite rate, half or double.
    """
    best = found[0]
    narrow = _beside(best.narrow, {each.narrow for each in found})
    dropped = _beside(best.dropped, {each.dropped for each in found})
    return [*((rate, best.dropped) for rate in narrow), *((best.narrow, rate) for rate in dropped)]


def _beside(rate: float, known: set[float]) -> list[float]:
    finite = sorted(each for each in known if math.isfinite(each))
    below, above = [each for each in finite if each < rate], [each for each in finite if each > rate]
    if math.isinf(rate):
        return [2.0 * below[-1]] if below else []
    return [
        math.sqrt(rate * below[-1]) if below else rate / 2.0,
        math.sqrt(rate * above[0]) if above else rate * 2.0,
    ]


def at_rates(space: PlanSpace, losses: Additive, narrow: float, dropped: float) -> Additive:
    """Losses with those of narrow bodies, and of dropped blocks, multiplied; by infinity: beyond any plan's."""
    return _scaled(losses, _factors(space, narrow, dropped))


def _factors(space: PlanSpace, narrow: float, dropped: float) -> dict[int, np.ndarray]:
    """Of all options of every body; the first changes nothing."""
    return {
        body: np.array([1.0, *(dropped if option == DROPPED else narrow for option in space.units[body].options[1:])])
        for body in space.bodies
    }


def _scaled(losses: Additive, factors: Mapping[int, np.ndarray]) -> Additive:
    """Infinite factors make losses that are larger than those of any plan: solvers want finite numbers."""
    rows = [*losses.of_unit.values(), *losses.of_sites.values()]
    forbidden = 1.0 + sum(float(np.abs(row).max(initial=0.0)) for row in rows)
    scaled = {
        body: np.where(np.isinf(each), forbidden, losses.of_unit[body] * np.where(np.isinf(each), 1.0, each))
        for body, each in factors.items()
    }
    return replace(losses, of_unit={**losses.of_unit, **scaled})
