"""Scores from the activations of units on calibration data. O = outputs, I = inputs, U = units."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.site import LinearSite
from llmcompress.model.units import UnitGroup
from llmcompress.numerics.importance import output_products, per_unit, similarity, unique_importance
from llmcompress.numerics.regression import lasso_order
from llmcompress.numerics.statistics import Gram, Moments, SquaredNorm, Statistic
from llmcompress.passes.pruning.scores.base import SCORES, Score
from llmcompress.passes.pruning.scores.gradients import TaylorFirst
from llmcompress.sensitivity.gradients import GradientObserver
from llmcompress.sensitivity.loss_estimators import Kinds


class _Activations(Score):
    """Computed from a reading linear's weight and a statistic of its input, summed over the readers."""

    statistic: ClassVar[type[Statistic]]

    @abstractmethod
    def of_reader(self, site: LinearSite, unit_of_I: Tensor, units: int) -> Tensor:
        """One number per unit (or per pair of units) from one measured reader."""

    def combined(self, sum_U: Tensor) -> Tensor:
        """The sum over all readers → importance."""
        return sum_U

    @property
    @override
    def kinds(self) -> Kinds:
        return (self.statistic,)

    @override
    def importance(self, block: BlockWork, group: UnitGroup) -> Tensor:
        owners_I = group.unit_of_column(next(block.module.parameters()).device)
        readers = [block.site(part.site) for part in group.parts if part.axis == "columns"]
        return self.combined(torch.stack([self.of_reader(site, owners_I, group.units) for site in readers]).sum(0))


@SCORES.register("activation")
class Activation(_Activations):
    """Σ |w| ‖x‖ over the unit's columns: Wanda's score, summed.

    Source: Sun et al., arXiv 2306.11695; Bonsai (arXiv 2402.05406) uses it as its prior.
    """

    statistic = SquaredNorm

    @override
    def of_reader(self, site: LinearSite, unit_of_I: Tensor, units: int) -> Tensor:
        norm_I = site.statistic(SquaredNorm).sum_I.sqrt()
        return per_unit(site.weight_OI.abs().sum(0) * norm_I, unit_of_I, units)


@SCORES.register("fluctuation")
class Fluctuation(_Activations):
    """Σ var(x) ‖w‖²: the part of the output that a constant could not replace.

    Source: An et al., arXiv 2312.11983 (FLAP), eq. 5; use it with `refit: bias`, which adds that constant.
    """

    statistic = Moments

    @override
    def of_reader(self, site: LinearSite, unit_of_I: Tensor, units: int) -> Tensor:
        return per_unit(site.weight_OI.square().sum(0) * site.statistic(Moments).variance_I, unit_of_I, units)


@SCORES.register("lasso")
class Lasso(_Activations):
    """How long a unit survives in a sparse regression of the readers' outputs on the units.

    Source: He et al., arXiv 1707.06168; use it with `refit: columns`, its second step.
    """

    statistic = Gram

    @override
    def of_reader(self, site: LinearSite, unit_of_I: Tensor, units: int) -> Tensor:
        return output_products(site.weight_OI, site.statistic(Gram).sum_II, unit_of_I, units)

    @override
    def combined(self, sum_U: Tensor) -> Tensor:
        return lasso_order(sum_U)


class _Similarity(_Activations):
    """U×U for every group: the similarity of the units' activations."""

    statistic = Gram

    @override
    def of_reader(self, site: LinearSite, unit_of_I: Tensor, units: int) -> Tensor:
        return similarity(site.statistic(Gram).sum_II, unit_of_I, units)

    @override
    def combined(self, sum_U: Tensor) -> Tensor:
        # readers share their input, so every one of them gave the same
        return sum_U / sum_U.diagonal().max().clamp_min(1)


@SCORES.register("uniqueness")
class Uniqueness(Score):
    """`taylor_first`, times one minus the similarity to the most similar unit with a higher score.

    Source: Santacroce et al., arXiv 2302.03773 (GUM). Differs: sensitivity is measured once on the trained model, not
    accumulated during fine-tuning, and uniqueness is a factor, not a regulariser.
    """

    estimates_loss: ClassVar[bool] = True

    def __init__(self, groups: Sequence[UnitGroup]) -> None:
        super().__init__(groups)
        self._felt, self._alike = TaylorFirst(groups), _Similarity(groups)

    @property
    @override
    def kinds(self) -> Kinds:
        return self._alike.kinds

    @property
    @override
    def observers(self) -> Sequence[GradientObserver]:
        return self._felt.observers

    @override
    def importance(self, block: BlockWork, group: UnitGroup) -> Tensor:
        felt_U = self._felt.importance(block, group)
        return unique_importance(felt_U.cpu(), self._alike.importance(block, group).cpu())
