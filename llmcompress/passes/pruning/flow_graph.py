"""Builds, from the map of a block, the graph of units on which SynFlow computes its scores."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from llmcompress.model.map import BlockStructure, Fold, WidthGroup, WidthPart
from llmcompress.numerics.synflow import Branch, Factor, Stage

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
"""An expert in the middle of a name."""


def flow_stages(structure: BlockStructure) -> tuple[Stage, ...]:
    """The branches of a block in order of execution; those that read the same tensor, or are experts, are parallel.

    A linear whose place the map does not know gets a branch of its own, so that it is scored by its size.
    """
    reads = {name: index for index, group in enumerate(structure.groups) for name in group.sites}
    found: list[tuple[int, str, Branch]] = []
    for site in structure.sites:
        branch = _into(structure, site.name)
        if branch:
            found.append((min((reads[name] for name in _givers(branch)), default=reads[site.name]), site.name, branch))
    known = {name for _, consumer, branch in found for name in (consumer, *_givers(branch))}
    for site in structure.sites:
        if site.name not in known:
            found.append((reads[site.name], site.name, _alone(site.name, site.outputs)))
    stages: dict[str, list[Branch]] = {}
    readers: dict[int, str] = {}
    for reader, name, branch in sorted(found, key=lambda each: each[0]):
        place = readers.setdefault(reader, _NUMBER.sub("#", name))
        stages.setdefault(place, []).append(branch)
    return tuple(map(tuple, stages.values()))


def _into(structure: BlockStructure, consumer: str) -> Branch | None:
    """What feeds a linear, if the map knows it: a fold (rows that come through unchanged), a width group, or both."""
    fold = next((f for f in structure.folds if not f.producer_is_norm and consumer in f.consumers), None)
    group = next((g for g in structure.width_groups if _part(g, consumer, "columns")), None)
    if fold is None and group is None:
        return None
    columns = structure.site(consumer).inputs
    parts, units, unit_of_C = _units(structure, consumer, columns, fold, group)
    source, row_of_C = _source(structure, parts, unit_of_C, fold)
    factors = []
    for name, unit_of_O in parts.items():
        if name == source:
            unit_of_O = unit_of_O.clone()
            unit_of_O[row_of_C] = -1
        if bool((unit_of_O >= 0).any()):
            factors.append(Factor(name, unit_of_O))
    return Branch(source, row_of_C, unit_of_C, units, tuple(factors), consumer)


def _units(
    structure: BlockStructure, consumer: str, columns: int, fold: Fold | None, group: WidthGroup | None
) -> tuple[dict[str, Tensor], int, Tensor]:
    """The unit of every row of the sites that feed the consumer, and of every column.

    Without a width group (a single key-value head) all is one unit: what reads the same tensor as the producer and
    has no other place multiplies it.
    """
    if group:
        rows = [part for part in group.parts if part.axis == "rows"]
        parts = {part.site: _owners(part.indices, structure.site(part.site).outputs) for part in rows}
        own = _part(group, consumer, "columns")
        assert own
        return parts, group.units, _owners(own.indices, columns)
    assert fold
    placed = {part.site for g in structure.width_groups for part in g.parts}
    placed |= {f.producer for f in structure.folds if f.producer != fold.producer}
    placed |= {name for f in structure.folds if not f.producer_is_norm for name in f.consumers}
    same = next(g.sites for g in structure.groups if fold.producer in g.sites)
    names = [name for name in same if name == fold.producer or name not in placed]
    parts = {name: torch.zeros(structure.site(name).outputs, dtype=torch.long) for name in names}
    return parts, 1, torch.zeros(columns, dtype=torch.long)


def _source(
    structure: BlockStructure, parts: dict[str, Tensor], unit_of_C: Tensor, fold: Fold | None
) -> tuple[str | None, Tensor]:
    """The linear whose rows the columns see, and which row each sees."""
    if fold and fold.producer in parts:
        return fold.producer, torch.tensor(fold.channel_map)
    for name, unit_of_O in parts.items():
        rows_O = unit_of_O >= 0
        # a single row for every unit: an activation function stands between, so there is no fold
        if int(rows_O.sum()) == int(unit_of_O.max()) + 1 and bool((unit_of_C >= 0).all()):
            row_of_U = torch.empty(int(unit_of_O.max()) + 1, dtype=torch.long)
            row_of_U[unit_of_O[rows_O]] = rows_O.nonzero().flatten()
            return name, row_of_U[unit_of_C]
    return None, torch.zeros_like(unit_of_C)


def _alone(name: str, outputs: int) -> Branch:
    nowhere = torch.full((outputs,), -1, dtype=torch.long)
    return Branch(name, torch.arange(outputs), nowhere, 0, (), None)


def _givers(branch: Branch) -> list[str]:
    names = [factor.site for factor in branch.factors]
    return names if branch.source is None else [branch.source, *names]


def _part(group: WidthGroup, site: str, axis: str) -> WidthPart | None:
    return next((part for part in group.parts if part.site == site and part.axis == axis), None)


def _owners(indices: Iterable[Iterable[int]], length: int) -> Tensor:
    """The unit of every row or column, -1 for none."""
    owners = torch.full((length,), -1, dtype=torch.long)
    for unit, members in enumerate(indices):
        owners[list(members)] = unit
    return owners
