"""Uniform plans: one choice for all linears and one for all blocks, which a search must not be worse than."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.space import DROPPED


def uniform_plans(space: PlanSpace) -> dict[str, Plan]:
    """Name → plan, with the first choices for the whole model; without the one that changes nothing."""
    whole = next(iter(space.space.bodies))
    found = {
        site if body == whole else f"{site}, {body}": space.uniform(site, body=body)
        for site in space.space.sites
        for body in space.space.bodies
    }
    return {name: plan for name, plan in found.items() if changes_something(space, plan)}


def changes_something(space: PlanSpace, plan: Plan) -> bool:
    """Whether it is not the dense model."""
    choices: dict[str, Mapping[str, Sequence[object]]] = {
        "sites": space.space.sites,
        "body": {**space.space.bodies, DROPPED: ("depth",)},
        "before": space.space.before,
        "after": space.space.after,
    }
    chosen = zip(space.units, space.canonical(plan), strict=True)
    return any(choices[unit.kind][unit.options[choice]] for unit, choice in chosen)
