"""The way of a plan through the blocks, one step per block that is kept. Plans that begin alike compute alike."""

from __future__ import annotations

from dataclasses import dataclass

from llmcompress.plan_search.plan_space import Plan, PlanSpace


@dataclass(frozen=True)
class Step:
    """One block: its body, and the option of every linear, in the order of the map."""

    block: int
    body: str
    options: tuple[str, ...]


def path_of(space: PlanSpace, plan: Plan) -> tuple[Step, ...]:
    """The steps of a plan; dropped blocks have none."""
    gone = space.dropped(plan)
    bodies: dict[int, str] = {}
    options: dict[tuple[int, str], str] = {}
    for unit, choice in zip(space.units, plan, strict=True):
        for block in unit.blocks:
            if unit.kind == "body":
                bodies[block] = unit.options[choice]
            options |= {(block, site): unit.options[choice] for site in unit.sites}
    return tuple(
        Step(info.index, bodies[info.index], tuple(options[info.index, site.name] for site in info.structure.sites))
        for info in space.model_map.blocks
        if info.index not in gone
    )


def whole_model_choices(space: PlanSpace, plan: Plan) -> tuple[str, str]:
    """The choices of `before` and `after`."""
    return space.units[0].options[plan[0]], space.units[-1].options[plan[-1]]
