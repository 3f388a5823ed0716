"""`PlanSpace`: a space on one model: its units, and plans, which choose one option for every unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from llmcompress.errors import CompressError, ExitCode, did_you_mean
from llmcompress.model.map import BlockInfo, ModelMap
from llmcompress.plan_search.space import DROPPED, Space

Kind = Literal["before", "body", "sites", "after"]
Plan = tuple[int, ...]
"""For every unit the index of its option."""


@dataclass(frozen=True)
class Unit:
    """What is decided at once."""

    name: str
    kind: Kind
    options: tuple[str, ...]
    blocks: tuple[int, ...] = ()
    """The blocks that it decides about; several where plans repeat. None for the whole model."""
    sites: tuple[str, ...] = ()
    """Linears relative to their block, the same in all these blocks; for kind `sites`."""
    body: int | None = None
    """Of kind `sites`: the unit, by its index, that decides about the body of these blocks."""

    @property
    def label(self) -> str:
        """Its name where those of all units are listed: a body and its block would have the same."""
        return f"{self.name} (body)" if self.kind == "body" else self.name


@dataclass(frozen=True, eq=False)
class PlanSpace:
    """Units in model order: `before`, then every block's body and sites, then `after`."""

    space: Space
    model_map: ModelMap

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """All of them; those with a single option are among them."""
        found = [Unit("before", "before", tuple(self.space.before))]
        drop = (DROPPED,) if self.space.most_dropped > 0 else ()
        blocks = self.model_map.blocks
        for first in range(min(self.space.period or len(blocks), len(blocks))):
            same = tuple(range(first, len(blocks), self.space.period or len(blocks)))
            info = blocks[first]
            body = len(found)
            found.append(Unit(info.name, "body", (*self.space.bodies, *drop), same))
            for sites in self._together(info):
                name = info.full(sites[0])
                found.append(Unit(name, "sites", tuple(self.space.sites), same, sites, body))
        return (*found, Unit("after", "after", tuple(self.space.after)))

    def _together(self, info: BlockInfo) -> list[tuple[str, ...]]:
        names = [site.name for site in info.structure.sites]
        if self.space.per == "site":
            return [(name,) for name in names]
        if self.space.per == "block":
            return [tuple(names)]
        return [tuple(group.sites) for group in info.structure.groups]

    @property
    def size(self) -> float:
        """How many plans there are, equal ones counted twice."""
        return float(np.prod([float(len(unit.options)) for unit in self.units]))

    @property
    def free(self) -> tuple[int, ...]:
        """Units, by index, that have a choice."""
        return tuple(index for index, unit in enumerate(self.units) if len(unit.options) > 1)

    def inside(self, body: int) -> tuple[int, ...]:
        """The units that decide about the sites of these blocks."""
        return tuple(index for index, unit in enumerate(self.units) if unit.body == body)

    @property
    def bodies(self) -> tuple[int, ...]:
        """The units that decide about bodies."""
        return tuple(index for index, unit in enumerate(self.units) if unit.kind == "body")

    def uniform(
        self, site: str, *, body: str | None = None, before: str | None = None, after: str | None = None
    ) -> Plan:
        """The plan with one choice for all linears, whole blocks and nothing else unless it is named."""
        named = {"before": before, "body": body, "sites": site, "after": after}
        return tuple(unit.options.index(name) if (name := named[unit.kind]) else 0 for unit in self.units)

    def canonical(self, plan: Plan) -> Plan:
        """Of all plans that make the same model, the first: what happens inside dropped blocks does not count."""
        return tuple(
            0 if unit.body is not None and self.is_dropped(plan, unit.body) else choice
            for unit, choice in zip(self.units, plan, strict=True)
        )

    def is_dropped(self, plan: Plan, body: int) -> bool:
        """Whether the blocks of that unit are left out."""
        return self.units[body].options[plan[body]] == DROPPED

    def dropped(self, plan: Plan) -> frozenset[int]:
        """The blocks that are left out."""
        return frozenset(
            block for body in self.bodies if self.is_dropped(plan, body) for block in self.units[body].blocks
        )

    def is_legal(self, plan: Plan) -> bool:
        """Whether no more blocks are dropped than may be, and at least one stays."""
        blocks, gone = len(self.model_map.blocks), len(self.dropped(plan))
        return gone < blocks and gone <= self.space.most_dropped * blocks

    def chosen(self, plan: Plan) -> dict[str, str]:
        """Unit → option, by name."""
        return {unit.label: unit.options[choice] for unit, choice in zip(self.units, plan, strict=True)}

    def plan(self, chosen: Mapping[str, str]) -> Plan:
        """The plan of such names; units that are not named have their first option.

        Raises: CompressError for a unit or an option that does not exist.
        """
        names = {unit.label: index for index, unit in enumerate(self.units)}
        found = [0] * len(self.units)
        for name, option in chosen.items():
            if name not in names:
                raise _unknown("unit", name, list(names))
            options = self.units[names[name]].options
            if option not in options:
                raise _unknown(f"choice of {name}", option, options)
            found[names[name]] = options.index(option)
        return tuple(found)

    def random(self, random: np.random.Generator) -> Plan:
        """Any legal plan, all options equally likely; blocks are dropped as often as may be and no more."""
        plan = [int(random.integers(len(unit.options))) for unit in self.units]
        gone = [index for index in self.bodies if self.is_dropped(tuple(plan), index)]
        while not self.is_legal(tuple(plan)):
            index = gone.pop(int(random.integers(len(gone))))
            plan[index] = int(random.integers(len(self.space.bodies)))
        return self.canonical(tuple(plan))

    def neighbours(self, plan: Plan) -> Iterator[Plan]:
        """All legal plans that differ in one unit."""
        for index in self.free:
            for choice in range(len(self.units[index].options)):
                other = self.canonical((*plan[:index], choice, *plan[index + 1 :]))
                if choice != plan[index] and other != plan and self.is_legal(other):
                    yield other

    def one_hot(self, plans: Sequence[Plan]) -> np.ndarray:
        """Plans × options of all units: 1 where it is chosen; units of dropped blocks have none."""
        starts = np.cumsum([0, *(len(unit.options) for unit in self.units)])
        found = np.zeros((len(plans), int(starts[-1])))
        for row, plan in enumerate(plans):
            for index, (unit, choice) in enumerate(zip(self.units, plan, strict=True)):
                if unit.body is None or not self.is_dropped(plan, unit.body):
                    found[row, starts[index] + choice] = 1.0
        return found

    def from_one_hot(self, row: np.ndarray) -> Plan:
        """The plan again; a row of probabilities gives the most likely options."""
        starts = np.cumsum([0, *(len(unit.options) for unit in self.units)])
        parts = (row[starts[index] : starts[index + 1]] for index in range(len(self.units)))
        return self.canonical(tuple(int(part.argmax()) for part in parts))

    def shell(self, plan: Plan) -> tuple[tuple[str, str, int], ...]:
        """How often each option occurs in units of each kind and sites: plans of one shell have equal totals."""
        counts = Counter(
            (f"{unit.kind}:{'+'.join(unit.sites)}:{self._body(plan, unit)}", unit.options[choice])
            for unit, choice in zip(self.units, self.canonical(plan), strict=True)
            for _ in unit.blocks or (0,)
        )
        return tuple(sorted((what, option, count) for (what, option), count in counts.items()))

    def _body(self, plan: Plan, unit: Unit) -> str:
        return "" if unit.body is None else self.units[unit.body].options[plan[unit.body]]


def _unknown(what: str, name: str, known: Sequence[str]) -> CompressError:
    return CompressError(
        "search.unknown", f"there is no {what} {name!r}", fix=did_you_mean(name, known), exit_code=ExitCode.USAGE
    )
