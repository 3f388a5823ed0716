"""Cuts rows and columns out of linears, and updates the map of the block. O = outputs, I = inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmcompress.model.map import BlockStructure, Fold, SiteInfo, WidthGroup, WidthPart

Axis = Literal["rows", "columns"]


@dataclass(frozen=True)
class Cut:
    """The rows and columns of one site that go, each ascending and without repeats."""

    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()

    def along(self, axis: Axis) -> tuple[int, ...]:
        """What goes along one axis."""
        return self.rows if axis == "rows" else self.columns


def cuts(structure: BlockStructure, keep: Mapping[int, Sequence[int]]) -> dict[str, Cut]:
    """Site → what goes when only these units of these width groups stay.

    Raises: ValueError for a group or a unit that does not exist, or a group of which nothing would stay.
    """
    gone: dict[tuple[str, Axis], set[int]] = {}
    for index, units in keep.items():
        if not 0 <= index < len(structure.width_groups):
            raise ValueError(f"there is no width group {index}; the block has {len(structure.width_groups)}")
        group, stay = structure.width_groups[index], set(units)
        if not stay or not stay <= set(range(group.units)):
            raise ValueError(f"the units to keep of width group {index} must be some of 0..{group.units - 1}")
        for part in group.parts:
            indices = (i for unit in range(group.units) if unit not in stay for i in part.indices[unit])
            gone.setdefault((part.site, part.axis), set()).update(indices)
    names = {name for (name, _), indices in gone.items() if indices}
    return {
        name: Cut(*(tuple(sorted(gone.get((name, axis), ()))) for axis in ("rows", "columns")))
        for name in sorted(names)
    }


@dataclass
class Sliced:
    """Linears that were made smaller; `restore` brings back the old tensors, which are kept, not copied."""

    before: list[tuple[nn.Module, dict[str, nn.Parameter], dict[str, int]]] = field(default_factory=list)

    def cut(self, linear: nn.Module, cut: Cut) -> None:
        """Take the rows and columns out of one linear."""
        parameters = dict(linear.named_parameters(recurse=False))
        sizes = {name: getattr(linear, name) for name in _SIZES if hasattr(linear, name)}
        self.before.append((linear, parameters, sizes))
        weight = parameters["weight"]
        rows, columns = (1, 0) if isinstance(linear, Conv1D) else (0, 1)
        smaller = _without(_without(weight.detach(), cut.rows, rows), cut.columns, columns)
        _set(linear, "weight", smaller, like=weight)
        if "bias" in parameters:
            _set(linear, "bias", _without(parameters["bias"].detach(), cut.rows, 0), like=parameters["bias"])
        for name in sizes:
            setattr(linear, name, smaller.shape[rows if _SIZES[name] == "rows" else columns])

    def restore(self) -> None:
        """Everything as it was."""
        for linear, parameters, sizes in self.before:
            for name, parameter in parameters.items():
                setattr(linear, name, parameter)
            for name, size in sizes.items():
                setattr(linear, name, size)


_SIZES: dict[str, Axis] = {"out_features": "rows", "in_features": "columns", "nf": "rows", "nx": "columns"}
"""Under which names `nn.Linear` and `Conv1D` note their sizes."""


def cut_structure(
    structure: BlockStructure, gone: Mapping[str, Cut], keep: Mapping[int, Sequence[int]]
) -> BlockStructure:
    """The map of the block after the cuts: the same sites, groups and folds in the new numbering."""
    numbers = {site.name: _Numbers(site, gone.get(site.name, Cut())) for site in structure.sites}
    sites = tuple(numbers[site.name].of(site) for site in structure.sites)
    widths = tuple(
        _width(group, sorted(set(keep.get(index, range(group.units)))), numbers)
        for index, group in enumerate(structure.width_groups)
    )
    return replace(
        structure, sites=sites, folds=tuple(_fold(fold, numbers) for fold in structure.folds), width_groups=widths
    )


class _Numbers:
    """New numbers of the rows and columns of one site."""

    def __init__(self, site: SiteInfo, cut: Cut) -> None:
        self.new: dict[Axis, dict[int, int]] = {
            "rows": _renumbered(site.outputs, cut.rows),
            "columns": _renumbered(site.inputs, cut.columns),
        }

    def of(self, site: SiteInfo) -> SiteInfo:
        return replace(site, outputs=len(self.new["rows"]), inputs=len(self.new["columns"]))


def _width(group: WidthGroup, stay: Sequence[int], numbers: Mapping[str, _Numbers]) -> WidthGroup:
    parts = []
    for part in group.parts:
        new = numbers[part.site].new[part.axis]
        # rows of a part may belong to several groups of the block, and so may be gone for another group's sake
        indices = tuple(tuple(new[i] for i in part.indices[unit] if i in new) for unit in stay)
        parts.append(WidthPart(part.site, part.axis, indices))
    return replace(group, units=len(stay), parts=tuple(parts))


def _fold(fold: Fold, numbers: Mapping[str, _Numbers]) -> Fold:
    columns = numbers[fold.consumers[0]].new["columns"]
    fed_by = [fold.channel_map[column] for column in columns]
    if not fold.producer_is_norm:
        rows = numbers[fold.producer].new["rows"]
        fed_by = [rows[row] for row in fed_by]
    return replace(fold, channel_map=tuple(fed_by))


def _renumbered(size: int, gone: Iterable[int]) -> dict[int, int]:
    missing = set(gone)
    return {old: new for new, old in enumerate(old for old in range(size) if old not in missing)}


def _without(values: Tensor, gone: Sequence[int], axis: int) -> Tensor:
    if not gone:
        return values
    stays = torch.ones(values.shape[axis], dtype=torch.bool)
    stays[list(gone)] = False
    return values.index_select(axis, stays.nonzero().flatten().to(values.device))


def _set(linear: nn.Module, name: str, value: Tensor, *, like: nn.Parameter) -> None:
    setattr(linear, name, nn.Parameter(value.contiguous(), requires_grad=like.requires_grad))
