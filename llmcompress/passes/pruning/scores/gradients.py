"""Scores from the gradient of the loss with respect to weights or unit masks. O = outputs, I = inputs, U = units."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.units import UnitGroup
from llmcompress.numerics.importance import first_order, mixed_order, per_unit, rearranged, second_order
from llmcompress.passes.base import Backward
from llmcompress.passes.pruning.scores.base import SCORES, Allocate, Score
from llmcompress.sensitivity.gradients import GradientObserver, UnitMasks, WeightGradients, oriented


class _Taylor(Score):
    """A sum over the weights of a unit of a Taylor term of the loss."""

    estimates_loss: ClassVar[bool] = True
    backward: ClassVar[Backward | None] = Backward(copies=1, recomputes=True)
    second: ClassVar[bool] = False
    """Whether squared gradients of single windows are needed: they take as much memory again."""

    @abstractmethod
    def along(self, weight: Tensor, gradient: Tensor, squared: Tensor, dim: int) -> Tensor:
        """Elementwise scores of one site, summed over `dim`."""

    def __init__(self, groups: Sequence[UnitGroup]) -> None:
        super().__init__(groups)
        names = dict.fromkeys(name for group in groups for name in group.sites)
        self._gradients = WeightGradients(list(names), squares=self.second)

    @property
    @override
    def observers(self) -> Sequence[GradientObserver]:
        return (self._gradients,)

    @override
    def importance(self, block: BlockWork, group: UnitGroup) -> Tensor:
        windows = self._gradients.windows
        found_U = torch.zeros(group.units, device=block.context.device)
        for part in group.parts:
            site = block.site(part.site)
            gradient = oriented(site, self._gradients.sums[site.name]) / windows
            squared = gradient.new_zeros(1, 1)
            if self.second:
                squared = oriented(site, self._gradients.squares[site.name]) / windows
            along = self.along(site.weight_OI, gradient, squared, 1 if part.axis == "rows" else 0)
            found_U += self.reduce(along, group.unit_of(part, len(along), along.device), group.units)
        return found_U

    def reduce(self, along: Tensor, owners: Tensor, units: int) -> Tensor:
        """Scores of rows or columns → of units."""
        return per_unit(along, owners, units)


@SCORES.register("taylor_first")
class TaylorFirst(_Taylor):
    """Σ |w g|: LLM-Pruner's element-wise first order.

    Source: Ma et al., arXiv 2305.11627. Differs: summed over all weights of a unit, in every linear it belongs to.
    """

    @override
    def along(self, weight: Tensor, gradient: Tensor, squared: Tensor, dim: int) -> Tensor:
        return first_order(weight, gradient, squared).sum(dim)


@SCORES.register("taylor_vector")
class TaylorVector(_Taylor):
    """|Σ w g| of each linear's part: LLM-Pruner's vector-wise form.

    Source: Ma et al., arXiv 2305.11627.
    """

    @override
    def along(self, weight: Tensor, gradient: Tensor, squared: Tensor, dim: int) -> Tensor:
        return (weight * gradient).sum(dim)

    @override
    def reduce(self, along: Tensor, owners: Tensor, units: int) -> Tensor:
        return per_unit(along, owners, units).abs()


@SCORES.register("taylor_second")
class TaylorSecond(_Taylor):
    """Σ |w H w| with the diagonal Fisher information for H: LLM-Pruner's second order.

    Source: Ma et al., arXiv 2305.11627.
    """

    backward: ClassVar[Backward | None] = Backward(copies=2, windows=1, recomputes=True)
    second: ClassVar[bool] = True

    @override
    def along(self, weight: Tensor, gradient: Tensor, squared: Tensor, dim: int) -> Tensor:
        return second_order(weight, gradient, squared).sum(dim)


@SCORES.register("taylor_mix")
class TaylorMix(_Taylor):
    """Σ |w g - w H w / 2|: both orders together.

    Source: Ma et al., arXiv 2305.11627, eq. 5.
    """

    backward: ClassVar[Backward | None] = Backward(copies=2, windows=1, recomputes=True)
    second: ClassVar[bool] = True

    @override
    def along(self, weight: Tensor, gradient: Tensor, squared: Tensor, dim: int) -> Tensor:
        return mixed_order(weight, gradient, squared).sum(dim)


class _MaskGradients(Score):
    """Computed from the gradients of the units' masks, window by window."""

    estimates_loss: ClassVar[bool] = True
    backward: ClassVar[Backward | None] = Backward(windows=1, recomputes=True)

    def __init__(self, groups: Sequence[UnitGroup]) -> None:
        super().__init__(groups)
        self._masks = UnitMasks(groups)

    @property
    @override
    def observers(self) -> Sequence[GradientObserver]:
        return (self._masks,)


@SCORES.register("fisher")
class Fisher(_MaskGradients):
    """Squared gradients of the masks; then swaps within each group by the full Fisher matrix.

    Source: Kwon et al., arXiv 2204.09656. Differs: the search for the number of heads is the allocation `global`, by
    importance per weight; and gradients are those of single windows. Squaring the sum over a batch, as there, makes
    scores depend on the batch size, and measured worse (docs/log.md).
    """

    @override
    def importance(self, block: BlockWork, group: UnitGroup) -> Tensor:
        return self._masks.stacked(self.groups.index(group)).square().sum(0)

    @override
    def choose(self, whole: WholeModel, allocate: Allocate) -> list[Tensor]:
        kept = allocate(self.priorities(self.measured(whole)))
        gradients = [self._masks.stacked(index) for index in range(len(self.groups))]
        return [
            ~rearranged(gradients_SU.T @ gradients_SU, ~kept_U)
            for gradients_SU, kept_U in zip(gradients, kept, strict=True)
        ]


@SCORES.register("group_fisher")
class GroupFisher(_MaskGradients):
    """Squared gradients of the masks, window by window, divided by the number of weights that the unit removes.

    Source: Liu et al., arXiv 2108.00708. Differs: all units are scored once, instead of one removed at a time.
    """

    @override
    def importance(self, block: BlockWork, group: UnitGroup) -> Tensor:
        index = self.groups.index(group)
        sum_U = torch.zeros(group.units)
        for of_group in self._masks.windows:
            sum_U += of_group[index].square().cpu()
        return sum_U
