"""A plan as an ordinary recipe: choices become passes with `sites` and `overrides`, dropped blocks a `depth` pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmcompress.errors import CompressError, ExitCode
from llmcompress.passes.base import PASSES, BlockPass, Pass
from llmcompress.plan_search.plan_space import Plan, PlanSpace, Unit
from llmcompress.recipe import Recipe

_SELECTION = frozenset({"sites", "exclude", "overrides"})


@dataclass(frozen=True)
class Slot:
    """A pass of the recipe: sites share it whose options differ only in what `overrides` may say."""

    name: str
    whole: tuple[tuple[str, Any], ...]
    """Options that are the same for all sites."""


Wanted = dict[str, list[tuple[Slot, dict[str, Any]]]]
"""Full name of a site → the passes that it gets, with its other options."""


def recipe_of(space: PlanSpace, plan: Plan, settings: Mapping[str, Any]) -> Recipe:
    """The recipe that makes this plan's model; `settings` are its other keys: calibration, saving, seed.

    Names of blocks are those after the dropped ones are gone, since `depth` comes before what is inside blocks.

    Raises: CompressError for the plan that changes nothing.
    """
    plan = space.canonical(plan)
    dropped = space.dropped(plan)
    passes: list[Pass] = []
    for unit, choice in zip(space.units, plan, strict=True):
        if unit.kind == "before":
            passes += space.space.before[unit.options[choice]]
    if dropped:
        passes.append(PASSES["depth"].model_validate({"blocks": sorted(dropped)}))
    passes += merged(_wanted(space, plan, "body"), _sites_left(space, dropped))
    passes += merged(_wanted(space, plan, "sites"), _sites_left(space, dropped))
    for unit, choice in zip(space.units, plan, strict=True):
        if unit.kind == "after":
            passes += space.space.after[unit.options[choice]]
    if not passes:
        raise CompressError(
            "search.nothing",
            "this plan changes nothing: it is the dense model",
            exit_code=ExitCode.USAGE,
            fix="choose another trial",
        )
    return Recipe.from_dict({**settings, "passes": passes})


def _sites_left(space: PlanSpace, dropped: frozenset[int]) -> dict[str, list[str]]:
    """Block → its sites, by full names as they are once the dropped blocks are gone."""
    names = [info.name for info in space.model_map.blocks]
    kept = [index for index in range(len(names)) if index not in dropped]
    return {
        names[place]: [f"{names[place]}.{site.name}" for site in space.model_map.blocks[index].structure.sites]
        for place, index in enumerate(kept)
    }


def _wanted(space: PlanSpace, plan: Plan, kind: str) -> Wanted:
    """What every site that stays gets of the choices of that kind, under its name after `depth`."""
    dropped, names = space.dropped(plan), [info.name for info in space.model_map.blocks]
    places = {index: place for place, index in enumerate(index for index in range(len(names)) if index not in dropped)}
    found: Wanted = {}
    for unit, choice in zip(space.units, plan, strict=True):
        if unit.kind != kind or (unit.body is None and unit.options[choice] not in space.space.bodies):
            continue
        choices = space.space.bodies if kind == "body" else space.space.sites
        for block in unit.blocks:
            if block in places:
                sites = _sites_of(space, unit, block)
                for was, name in ((f"{names[block]}.{site}", f"{names[places[block]]}.{site}") for site in sites):
                    found[name] = list(_slots(choices[unit.options[choice]], was))
    return found


def _sites_of(space: PlanSpace, unit: Unit, block: int) -> Sequence[str]:
    return unit.sites or [site.name for site in space.model_map.blocks[block].structure.sites]


def _slots(passes: Sequence[Pass], site: str) -> Iterator[tuple[Slot, dict[str, Any]]]:
    for each in passes:
        assert isinstance(each, BlockPass)
        if each.selects(site):
            options = {
                key: value
                for key, value in each.for_site(site).model_dump(mode="json").items()
                if key not in _SELECTION
            }
            fixed = type(each).whole_block | {"new_stage"}
            whole = tuple(sorted((key, _frozen(options.pop(key))) for key in fixed & options.keys()))
            yield Slot(PASSES.name_of(type(each)), whole), options


def merged(wanted: Wanted, blocks: Mapping[str, Sequence[str]]) -> list[Pass]:
    """One pass for each slot, in an order that keeps that of every site."""
    order: list[Slot] = []
    placed: dict[str, list[int]] = {}
    for site, sequence in wanted.items():
        last = -1
        for slot, _ in sequence:
            after = [index for index, known in enumerate(order) if known == slot and index > last]
            if after:
                last = after[0]
            else:
                last += 1
                order.insert(last, slot)
                placed = {name: [at + (at >= last) for at in places] for name, places in placed.items()}
            placed.setdefault(site, []).append(last)
    found = []
    for index, slot in enumerate(order):
        users = {
            site: options
            for site, sequence in wanted.items()
            for at, (_, options) in zip(placed.get(site, ()), sequence, strict=True)
            if at == index
        }
        found.append(_pass(slot, users, blocks))
    return found


def _pass(slot: Slot, users: Mapping[str, Mapping[str, Any]], blocks: Mapping[str, Sequence[str]]) -> Pass:
    by_options: dict[object, list[str]] = {}
    for site, options in users.items():
        by_options.setdefault(_frozen(options), []).append(site)
    common = max(by_options.values(), key=len)
    base = users[common[0]]
    overrides = {}
    for sites in by_options.values():
        changed = {key: value for key, value in users[sites[0]].items() if base.get(key) != value}
        if changed:
            overrides["|".join(globs(sites, blocks))] = changed
    whole = {key: _thawed(value) for key, value in slot.whole}
    return PASSES[slot.name].model_validate(
        {**whole, **base, "sites": globs(list(users), blocks), "overrides": overrides}
    )


def globs(sites: Sequence[str], blocks: Mapping[str, Sequence[str]]) -> list[str]:
    """The fewest globs that match these sites and no others: all, whole kinds, whole blocks, single names."""
    left, everything = set(sites), {site for each in blocks.values() for site in each}
    if left == everything:
        return ["*"]
    kinds: dict[str, set[str]] = {}
    for block, each in blocks.items():
        for site in each:
            kinds.setdefault(site.removeprefix(f"{block}."), set()).add(site)
    found = []
    for kind, names in kinds.items():
        if names <= set(sites) and len(names) > 1:
            found.append(f"*.{kind}")
            left -= names
    for block, each in blocks.items():
        if left & set(each) and set(each) <= set(sites):
            found.append(f"{block}.*")
            left -= set(each)
    return [*found, *(site for site in sites if site in left)]


def _frozen(value: Any) -> Any:
    """Hashable, and in an order of its own."""
    if isinstance(value, Mapping):
        return ("mapping", *((key, _frozen(value[key])) for key in sorted(value)))
    if isinstance(value, list | tuple):
        return ("list", *map(_frozen, value))
    return value


def _thawed(value: Any) -> Any:
    if isinstance(value, tuple) and value and value[0] == "mapping":
        return {key: _thawed(inner) for key, inner in value[1:]}
    if isinstance(value, tuple) and value and value[0] == "list":
        return [_thawed(inner) for inner in value[1:]]
    return value
