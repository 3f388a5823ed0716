"""Refits the kept weights of a pruned matrix to minimize its output error. O = outputs, I = inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Repaired(NamedTuple):
    """The weight, and the squared error of its outputs."""

    weight_OI: Tensor
    error: float


def repair_kept(weight_OI: Tensor, pruned_OI: Tensor, kept_OI: Tensor, gram_II: Tensor, *, steps: int) -> Repaired:
    """The pruned weight after some steps of conjugate gradients towards the best one with the same zeros.

    Every row is a least-squares problem over its own kept inputs; all take their steps together, and no step makes any
    row's output error larger. A sweep over the columns can only repair a weight with the columns behind it; this moves
    all of them.

    Source: for the problem, Boža, arXiv 2401.02938, who solves it by another method.
    """
    diagonal_I = gram_II.diagonal()
    scale_I = torch.where(diagonal_I > 0, diagonal_I, torch.ones_like(diagonal_I))
    kept_OI = kept_OI.to(weight_OI.dtype)
    pruned_OI = pruned_OI.clone()
    missing_OI = weight_OI - pruned_OI
    residual_OI = missing_OI @ gram_II
    error = float(missing_OI.mul_(residual_OI).sum(dtype=torch.float64))
    residual_OI.mul_(kept_OI)
    direction_OI = residual_OI / scale_I
    descent_O1 = (residual_OI * direction_OI).sum(1, keepdim=True)
    for step in range(steps):
        seen_OI = (direction_OI @ gram_II).mul_(kept_OI)
        length_O1 = _divided(descent_O1, (direction_OI * seen_OI).sum(1, keepdim=True))
        pruned_OI.addcmul_(length_O1, direction_OI)
        error -= float((length_O1 * descent_O1).sum(dtype=torch.float64))
        if step + 1 == steps:
            break
        residual_OI.addcmul_(length_O1, seen_OI, value=-1)
        scaled_OI = residual_OI / scale_I
        before_O1, descent_O1 = descent_O1, (residual_OI * scaled_OI).sum(1, keepdim=True)
        direction_OI.mul_(_divided(descent_O1, before_O1)).add_(scaled_OI)
    return Repaired(pruned_OI, error)


def _divided(numerator_O1: Tensor, denominator_O1: Tensor) -> Tensor:
    """0 where a row has nothing left to descend."""
    usable_O1 = denominator_O1 > 0
    return torch.where(usable_O1, numerator_O1 / torch.where(usable_O1, denominator_O1, 1.0), 0.0)
