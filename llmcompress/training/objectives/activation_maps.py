"""Distillation of activation maps: where in a text a layer is active. B = samples, T = tokens, D = width."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from llmcompress.training.data.batch import IGNORED, Batch
from llmcompress.training.features import Features, Wanted
from llmcompress.training.objectives.base import OBJECTIVES
from llmcompress.training.objectives.features import FeatureObjective


@OBJECTIVES.register("activation_maps")
class ActivationMaps(FeatureObjective):
    """‖ Q(student) / ‖Q(student)‖ - Q(teacher) / ‖Q(teacher)‖ ‖, mean over samples and mapped layers.

    Q is the mean of squares over channels at every position, a map over the text: widths need not be equal. The paper
    multiplies it by about 1000 (`factor`).

    Source: Zagoruyko & Komodakis, arXiv 1612.03928, equation 2.
    """

    @override
    def observes(self) -> Wanted:
        return Wanted(hidden=True)

    @override
    def value(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        counts_BT = batch.targets_BT != IGNORED
        each = [
            _distance(_map(mine, counts_BT), _map(theirs, counts_BT))
            for _, mine, theirs in self.pairs(student.hidden, teacher.hidden)
        ]
        return torch.stack(each).mean()


def _map(hidden_BTD: Tensor, counts_BT: Tensor) -> Tensor:
    squares_BT = hidden_BTD.square().mean(-1).where(counts_BT, 0.0)
    return functional.normalize(squares_BT, dim=-1)


def _distance(mine_BT: Tensor, theirs_BT: Tensor) -> Tensor:
    """Mean over samples; the norm's gradient at zero is set to zero."""
    squares_B = (mine_BT - theirs_BT).square().sum(-1)
    return squares_B.where(squares_B == 0, squares_B.clamp(min=1e-30).sqrt()).mean()
