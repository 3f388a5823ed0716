"""Finds by experiment the integer attributes that depend on the number of heads: changes them until the block works."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import nn
from transformers import PretrainedConfig

from llmcompress.model.map import WidthGroup
from llmcompress.modules.private_config import PrivateConfig, config_integers

_MOST_TOGETHER = 4
"""Attributes of different value that a family is known to need changed at once, and one more."""
_MOST_ALONE = 12
"""Beyond this many candidates, single ones are not combined: every combination costs a forward."""


@dataclass(frozen=True)
class Attribute:
    """An integer of a module, or of the config that it reads, and what it would become."""

    owner: nn.Module
    name: str
    old: int
    new: int
    in_config: bool = False

    def set(self, value: int) -> None:
        """Write it; a config is shared by all modules, so the owner gets one of its own first."""
        if not self.in_config:
            setattr(self.owner, self.name, value)
            return
        own = PrivateConfig.over(self.owner.config)
        setattr(own, self.name, value)
        self.owner.config = own  # type: ignore[assignment]


def change_until(works: Callable[[], bool], candidates: Sequence[Attribute]) -> tuple[Attribute, ...] | None:
    """Make `works` true by changing as few of the candidates as possible; None, and nothing changed, if none will do.

    Attributes of equal value are first changed together, modules' own before those of configs; then each one that
    was not needed is set back, so that nothing changes which the experiment does not ask for.
    """
    own = [attribute for attribute in candidates if not attribute.in_config]
    alone = [[attribute] for attribute in candidates] if len(candidates) <= _MOST_ALONE else []
    for groups in (_by_value(own), _by_value(candidates), alone):
        for chosen in _combinations(groups):
            with_configs = _Changed(chosen)
            if works():
                return _needed(works, chosen, with_configs)
            with_configs.undo()
    return None


def head_counts(block: nn.Module, groups: Iterable[tuple[WidthGroup, int]]) -> list[Attribute]:
    """Integers of the modules around the parts that may count units, or rows and columns of all units together.

    Each group comes with the number of units that stay.
    """
    found: dict[tuple[int, str, bool], Attribute] = {}
    for group, left in groups:
        each = {len(indices) for part in group.parts for indices in part.indices}
        for owner in _owners(block, [part.site for part in group.parts]):
            for name, value, in_config in _integers(owner):
                multiple = value // group.units
                if value % group.units == 0 and any(multiple and size % multiple == 0 for size in each):
                    found[id(owner), name, in_config] = Attribute(owner, name, value, multiple * left, in_config)
    return list(found.values())


class _Changed:
    """Attributes set to their new values, and the way back."""

    def __init__(self, chosen: Iterable[Attribute]) -> None:
        self.chosen = list(chosen)
        self.configs = [(a.owner, a.owner.config) for a in self.chosen if a.in_config]
        for attribute in self.chosen:
            attribute.set(attribute.new)

    def undo(self) -> None:
        for attribute in self.chosen:
            if not attribute.in_config:
                attribute.set(attribute.old)
        for owner, config in self.configs:
            owner.config = config  # the shared one itself, not another copy


def _needed(works: Callable[[], bool], chosen: Sequence[Attribute], changed: _Changed) -> tuple[Attribute, ...]:
    needed = list(chosen)
    for attribute in chosen:
        fewer = [other for other in needed if other is not attribute]
        changed.undo()
        trial = _Changed(fewer)
        if works():
            needed, changed = fewer, trial
        else:
            trial.undo()
            changed = _Changed(needed)
    return tuple(needed)


def _by_value(candidates: Iterable[Attribute]) -> list[list[Attribute]]:
    groups: defaultdict[int, list[Attribute]] = defaultdict(list)
    for attribute in candidates:
        groups[attribute.old].append(attribute)
    return list(groups.values())


def _combinations(groups: Sequence[Sequence[Attribute]]) -> Iterator[list[Attribute]]:
    """All choices of at most a few groups, small ones first."""
    for count in range(1, min(len(groups), _MOST_TOGETHER) + 1):
        for chosen in combinations(groups, count):
            yield [attribute for group in chosen for attribute in group]


def _owners(block: nn.Module, sites: Iterable[str]) -> list[nn.Module]:
    """The modules between the block (without it) and the sites."""
    names = {name.rpartition(".")[0] for name in sites}
    while more := {name.rpartition(".")[0] for name in names} - names:
        names |= more
    return [block.get_submodule(name) for name in sorted(names) if name]


def _integers(owner: nn.Module) -> Iterator[tuple[str, int, bool]]:
    for name, value in vars(owner).items():
        if type(value) is int and not name.startswith("_"):
            yield name, value, False
    config = getattr(owner, "config", None)
    if isinstance(config, PretrainedConfig | PrivateConfig):
        for name, value in config_integers(config).items():
            yield name, value, True
