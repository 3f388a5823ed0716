"""Units that can be removed individually, with full names, and masks that switch them off. U = units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmcompress.model.map import BlockInfo, BlockStructure, ModelMap, WidthPart
from llmcompress.model.shrink import kind_of

Kind = Literal["channels", "heads"]


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """One width group of one block: units that can be removed one by one."""

    block: BlockInfo
    index: int
    kind: Kind
    units: int
    parameters: int
    """Weights of one unit; biases are not counted."""

    @property
    def name(self) -> str:
        """The full name of the first linear that reads the units: under it recipes and tables speak of the group."""
        return self.readers[0]

    @property
    def parts(self) -> tuple[WidthPart, ...]:
        """Rows and columns of sites, by names relative to the block."""
        return self.block.structure.width_groups[self.index].parts

    @property
    def fixed(self) -> bool:
        """Whether the block cannot do without any of them."""
        return self.block.structure.width_groups[self.index].fixed

    @property
    def readers(self) -> tuple[str, ...]:
        """Sites that read the units, by full name: cutting their columns cuts the units off."""
        return tuple(self.block.full(part.site) for part in self.parts if part.axis == "columns")

    @property
    def sites(self) -> tuple[str, ...]:
        """Full names of all sites that have a part in it."""
        return tuple(self.block.full(part.site) for part in self.parts)

    def unit_of_column(self, device: torch.device | None = None) -> Tensor:
        """For every column of the readers the unit it belongs to, -1 for none."""
        part = next(part for part in self.parts if part.axis == "columns")
        return self.unit_of(part, self.block.structure.site(part.site).inputs, device)

    def unit_of(self, part: WidthPart, length: int, device: torch.device | None = None) -> Tensor:
        """For every row or column of a part the unit it belongs to, -1 for none."""
        owners = torch.full((length,), -1, dtype=torch.long)
        for unit, indices in enumerate(part.indices):
            owners[list(indices)] = unit
        return owners.to(device)


def unit_groups(model_map: ModelMap) -> list[UnitGroup]:
    """All width groups of all blocks, in model order."""
    return [group for info in model_map.blocks for group in groups_of(info)]


def groups_of(info: BlockInfo) -> list[UnitGroup]:
    """The width groups of one block."""
    return [
        UnitGroup(info, index, kind_of(group), group.units, _parameters(info, group.parts) // group.units)
        for index, group in enumerate(info.structure.width_groups)
    ]


def removable_groups(info: BlockInfo) -> list[UnitGroup]:
    """Those of which some units can go."""
    return [group for group in groups_of(info) if not group.fixed]


def kept_fraction(groups: Iterable[UnitGroup], site: str, removed_share: Callable[[UnitGroup], float]) -> float:
    """Fraction of a site's weights that is kept if every group loses that fraction of its units."""
    kept = 1.0
    for group in groups:
        for part in group.parts:
            if group.block.full(part.site) == site:
                info = group.block.structure.site(part.site)
                covered = sum(map(len, part.indices)) / (info.outputs if part.axis == "rows" else info.inputs)
                kept *= 1 - covered * removed_share(group)
    return kept


def feed_forward_readers(structure: BlockStructure) -> frozenset[str]:
    """Sites that read what a feed-forward network computes inside: channels that can go one by one.

    Attention's can only go by whole heads.
    """
    return frozenset(
        part.site
        for group in structure.width_groups
        for part in group.parts
        if part.axis == "columns" and group.units > 1 and all(len(columns) == 1 for columns in part.indices)
    )


@contextmanager
def masked(model: nn.Module, groups: Sequence[UnitGroup], masks: Sequence[Tensor]) -> Iterator[None]:
    """The model computes as if every unit's output were multiplied by its mask, for as long as the context lasts."""
    with ExitStack() as stack:
        for group, mask_U in zip(groups, masks, strict=True):
            owner_I = group.unit_of_column(mask_U.device)
            ones = mask_U.new_ones(1)
            mask_I = torch.cat([mask_U, ones])[torch.where(owner_I < 0, len(mask_U), owner_I)]
            for name in group.readers:
                stack.enter_context(_input_times(model.get_submodule(name), mask_I))
        yield


@contextmanager
def _input_times(module: nn.Module, mask_I: Tensor) -> Iterator[None]:
    def multiply(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * mask_I.to(args[0].dtype), *args[1:])

    handle = module.register_forward_pre_hook(multiply)
    try:
        yield
    finally:
        handle.remove()


def _parameters(info: BlockInfo, parts: Sequence[WidthPart]) -> int:
    """Weights in the rows and columns of all units together."""
    total = 0
    for part in parts:
        site = info.structure.site(part.site)
        across = site.inputs if part.axis == "rows" else site.outputs
        total += across * sum(map(len, part.indices))
    return total
