"""What a score is: one number per unit, greater for units that matter more. U = units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from llmcompress.calibration.whole import WholeModel
from llmcompress.numerics.importance import standardised
from llmcompress.passes.base import Backward
from llmcompress.passes.pruning.units import UnitGroup
from llmcompress.registry import Registry

Allocate = Callable[[Sequence[Tensor]], list[Tensor]]
"""Priorities per group (greater: keep) → True for the units that stay."""


class Score(ABC):
    """One way to say which units matter. It has no options: what needs some is a pass of its own."""

    needs_data: ClassVar[bool] = True
    """Whether calibration windows are read."""

    estimates_loss: ClassVar[bool] = False
    """Whether a unit's importance estimates how much the model's loss grows without it. Such numbers of different
    layers can be compared as they are, per weight removed; others are standardised within their group first."""

    backward: ClassVar[Backward | None] = None
    """What is held while gradients are taken, for a score that needs them."""

    @abstractmethod
    def importance(self, whole: WholeModel, groups: Sequence[UnitGroup]) -> list[Tensor]:
        """One number per unit of every group, on any device."""

    def choose(self, whole: WholeModel, groups: Sequence[UnitGroup], allocate: Allocate) -> list[Tensor]:
        """True for the units that stay, on the CPU."""
        return allocate(self.priorities(groups, self.importance(whole, groups)))

    def priorities(self, groups: Sequence[UnitGroup], importances: Sequence[Tensor]) -> list[Tensor]:
        """Numbers that can be compared between groups; within a group they have the order of the importances."""
        if self.estimates_loss:
            return [
                (importance_U / group.parameters).cpu() for group, importance_U in zip(groups, importances, strict=True)
            ]
        return [standardised(importance_U.double()).cpu() for importance_U in importances]


SCORES: Registry[Score] = Registry("score", "llmcompress.passes.pruning.scores")
