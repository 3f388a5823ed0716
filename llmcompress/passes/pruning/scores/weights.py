"""Scores that use the weights only. U = units."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.units import UnitGroup
from llmcompress.numerics.importance import per_unit
from llmcompress.passes.pruning.scores.base import SCORES, Score


@SCORES.register("random")
class Random(Score):
    """Random scores: what the other scores must beat."""

    needs_data: ClassVar[bool] = False

    def __init__(self, groups: Sequence[UnitGroup]) -> None:
        super().__init__(groups)
        self._generator: torch.Generator | None = None

    @override
    def importance(self, block: BlockWork, group: UnitGroup) -> Tensor:
        if self._generator is None:
            self._generator = block.context.generator()
        return torch.rand(group.units, generator=self._generator)


class _Norm(Score):
    """A norm of all weights of a unit: its rows of the producers and its columns of the readers."""

    needs_data: ClassVar[bool] = False

    @abstractmethod
    def elements(self, weight_OI: Tensor) -> Tensor:
        """What each weight adds to the norm."""

    @override
    def importance(self, block: BlockWork, group: UnitGroup) -> Tensor:
        parts = []
        for part in group.parts:
            elements_OI = self.elements(block.site(part.site).weight_OI)
            along = elements_OI.sum(1 if part.axis == "rows" else 0)
            parts.append(per_unit(along, group.unit_of(part, len(along), along.device), group.units))
        return torch.stack(parts).sum(0)


@SCORES.register("l1")
class L1(_Norm):
    """Sum of |w| over the unit.

    Source: Li et al., arXiv 1608.08710. Differs: of all rows and columns that go together, not of the filter alone.
    """

    @override
    def elements(self, weight_OI: Tensor) -> Tensor:
        return weight_OI.abs()


@SCORES.register("l2")
class L2(_Norm):
    """Sum of w² over the unit: the same order as its L2 norm.

    Source: Li et al., arXiv 1608.08710. Differs: of all rows and columns that go together, not of the filter alone.
    """

    @override
    def elements(self, weight_OI: Tensor) -> Tensor:
        return weight_OI.square()
