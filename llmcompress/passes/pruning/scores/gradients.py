"""Scores from the gradient of the loss in the weights or in the units' masks. O = outputs, I = inputs, U = units."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.numerics.importance import first_order, mixed_order, per_unit, rearranged, second_order
from llmcompress.passes.base import Backward
from llmcompress.passes.pruning.scores.base import SCORES, Allocate, Score
from llmcompress.passes.pruning.units import UnitGroup, mask_gradients


class _Taylor(Score):
    """A sum over the weights of a unit, of what the gradient says about them."""

    estimates_loss: ClassVar[bool] = True
    backward: ClassVar[Backward | None] = Backward(copies=2)
    second: ClassVar[bool] = False
    """Whether squared gradients of single windows are needed: they take as much memory again."""

    @abstractmethod
    def along(self, weight: Tensor, gradient: Tensor, squared: Tensor, dim: int) -> Tensor:
        """Elementwise scores of one site, summed over `dim`."""

    @override
    def importance(self, whole: WholeModel, groups: Sequence[UnitGroup]) -> list[Tensor]:
        transposed = {site.name: site.info.transposed for site in whole.sites()}
        found = [torch.zeros(group.units, device=whole.context.device) for group in groups]
        of_site: dict[str, list[tuple[int, UnitGroup]]] = {}
        for number, group in enumerate(groups):
            for name in group.sites:
                of_site.setdefault(name, []).append((number, group))
        for name, weight, gradient, squared in _weight_gradients(whole, list(of_site), second=self.second):
            if transposed[name]:
                weight, gradient, squared = weight.T, gradient.T, squared.T
            for number, group in of_site[name]:
                for part in group.parts:
                    if group.block.full(part.site) == name:
                        along = self.along(weight, gradient, squared, 1 if part.axis == "rows" else 0)
                        owners = group.unit_of(part, len(along), along.device)
                        found[number] += self.reduce(along, owners, group.units)
        return found

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

    backward: ClassVar[Backward | None] = Backward(copies=3, windows=1)
    second: ClassVar[bool] = True

    @override
    def along(self, weight: Tensor, gradient: Tensor, squared: Tensor, dim: int) -> Tensor:
        return second_order(weight, gradient, squared).sum(dim)


@SCORES.register("taylor_mix")
class TaylorMix(_Taylor):
    """Σ |w g - w H w / 2|: both orders together.

    Source: Ma et al., arXiv 2305.11627, eq. 5.
    """

    backward: ClassVar[Backward | None] = Backward(copies=3, windows=1)
    second: ClassVar[bool] = True

    @override
    def along(self, weight: Tensor, gradient: Tensor, squared: Tensor, dim: int) -> Tensor:
        return mixed_order(weight, gradient, squared).sum(dim)


@SCORES.register("fisher")
class Fisher(Score):
    """Squared gradients of the masks; then swaps within each group by the full Fisher matrix.

    Source: Kwon et al., arXiv 2204.09656. Differs: the search for the number of heads is the allocation `global`, by
    importance per weight; and gradients are those of single windows. Squaring the sum over a batch, as there, makes
    scores depend on the batch size, and measured worse (docs/log.md).
    """

    estimates_loss: ClassVar[bool] = True
    backward: ClassVar[Backward | None] = Backward(windows=1)

    @override
    def importance(self, whole: WholeModel, groups: Sequence[UnitGroup]) -> list[Tensor]:
        return [gradients_SU.square().sum(0) for gradients_SU in _stacked(whole, groups)]

    @override
    def choose(self, whole: WholeModel, groups: Sequence[UnitGroup], allocate: Allocate) -> list[Tensor]:
        gradients = _stacked(whole, groups)
        kept = allocate(self.priorities(groups, [gradients_SU.square().sum(0) for gradients_SU in gradients]))
        return [
            ~rearranged(gradients_SU.T @ gradients_SU, ~kept_U)
            for gradients_SU, kept_U in zip(gradients, kept, strict=True)
        ]


@SCORES.register("group_fisher")
class GroupFisher(Score):
    """Squared gradients of the masks, window by window, per weight that goes with the unit.

    Source: Liu et al., arXiv 2108.00708. Differs: all units are scored once, instead of one removed at a time.
    """

    estimates_loss: ClassVar[bool] = True
    backward: ClassVar[Backward | None] = Backward(windows=1)

    @override
    def importance(self, whole: WholeModel, groups: Sequence[UnitGroup]) -> list[Tensor]:
        found = [torch.zeros(group.units) for group in groups]
        for gradients in mask_gradients(whole, groups, sequences=1):
            for sum_U, gradient_U in zip(found, gradients, strict=True):
                sum_U += gradient_U.square().cpu()
        return found


def _stacked(whole: WholeModel, groups: Sequence[UnitGroup]) -> list[Tensor]:
    """For every group the gradients of its masks, windows × units, in float64 on the CPU."""
    rows = list(mask_gradients(whole, groups, sequences=1))
    return [torch.stack([each[index] for each in rows]).double().cpu() for index in range(len(groups))]


def _weight_gradients(
    whole: WholeModel, names: Sequence[str], *, second: bool
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, weight, mean gradient and mean squared gradient per window of every site (zeros unless `second`)."""
    with whole.resident() as model:
        model.requires_grad_(False)
        weights = {name: _weight(model.get_submodule(name)).requires_grad_(True) for name in names}
        sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        squares = {
            name: torch.zeros_like(weight) if second else sums[name].new_zeros(1, 1) for name, weight in weights.items()
        }
        for ids_BT in torch.split(whole.context.windows_NT, 1) if second else whole.batches():
            with torch.enable_grad():
                loss = whole.loss(ids_BT.to(whole.context.device)) * len(ids_BT)
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:  # an expert that no token reached has none
                    sums[name] += gradient
                    if second:
                        squares[name] += gradient.square()
        windows = max(len(whole.context.windows_NT), 1)
        for name, weight in weights.items():
            yield name, weight.detach(), sums[name] / windows, squares[name] / windows


def _weight(module: nn.Module) -> nn.Parameter:
    return module.get_parameter("weight")
