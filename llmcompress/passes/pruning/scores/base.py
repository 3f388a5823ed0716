"""The base class of scores: one number per unit, larger for more important units. U = units."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.site import LinearSite
from llmcompress.model.units import UnitGroup
from llmcompress.numerics.importance import standardised
from llmcompress.passes.base import Backward
from llmcompress.registry import Registry
from llmcompress.sensitivity.loss_estimators import LossEstimator, cached_table, measure_losses
from llmcompress.sensitivity.table import LossTable, Row

Allocate = Callable[[Sequence[Tensor]], list[Tensor]]
"""Priorities per group (greater: keep) → True for the units that stay."""


class Score(LossEstimator):
    """One importance score. It has no options; a method with options is a pass.

    Its table has a row per group, named after the linear that reads it; the options are the units that can be removed.
    """

    needs_data: ClassVar[bool] = True
    """Whether calibration windows are read."""

    estimates_loss: ClassVar[bool] = False
    """Whether a unit's importance estimates how much the model's loss grows without it. Such numbers of different
    layers can be compared as they are, per weight removed; others are standardised within their group first."""

    backward: ClassVar[Backward | None] = None
    """What is held while gradients are taken, for a score that needs them."""

    def __init__(self, groups: Sequence[UnitGroup]) -> None:
        self.groups = tuple(groups)
        """In model order."""

    @property
    @override
    def sites(self) -> frozenset[str]:
        return frozenset(name for group in self.groups for name in group.readers)

    @abstractmethod
    def importance(self, block: BlockWork, group: UnitGroup) -> Tensor:
        """One number per unit of a group of this block, on any device."""

    @override
    def rows(self, block: BlockWork, sites: Sequence[LinearSite]) -> Iterator[Row]:
        stored = torch.finfo(block.context.storage_dtype).bits
        for group in self.groups:
            if group.block.index == block.info.index:
                units, size = range(group.units), group.parameters
                importance_U = self.importance(block, group)
                yield Row.of(
                    group.name, list(map(str, units)), importance_U, [size * stored] * len(units), [[size]] * len(units)
                )

    def choose(self, whole: WholeModel, allocate: Allocate) -> list[Tensor]:
        """True for the units that stay, on the CPU."""
        return allocate(self.priorities(cached_table(whole, "unit-losses", lambda: self.measured(whole))))

    def measured(self, whole: WholeModel) -> LossTable:
        """The table, measured now."""
        (table,) = measure_losses(whole, [self])
        return table

    def priorities(self, table: LossTable) -> list[Tensor]:
        """Numbers that can be compared between groups; within a group they have the order of the importances."""
        assert table.units == tuple(group.name for group in self.groups)
        if self.estimates_loss:
            return [row.loss_C / group.parameters for row, group in zip(table.rows, self.groups, strict=True)]
        return [standardised(row.loss_C) for row in table.rows]


SCORES: Registry[Score] = Registry("score", "llmcompress.passes.pruning.scores")
