"""Adjusts weights to compensate for errors in their inputs. O = outputs, I = inputs, T = tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Drift:
    """What a linear's input lost: sums over tokens, d being the input in the dense model and x what it is now."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.gram_II = torch.zeros(inputs, inputs, dtype=torch.float32, device=device)
        """Σ x xᵀ."""
        self.lost_II = torch.zeros_like(self.gram_II)
        """Σ (d - x) xᵀ."""

    def add(self, dense_TI: Tensor, x_TI: Tensor) -> None:
        """Take in more tokens, the same in the same order."""
        self.gram_II.addmm_(x_TI.T, x_TI)
        self.lost_II.addmm_((dense_TI - x_TI).T, x_TI)


def compensated(weights: Sequence[Tensor], drift: Drift, *, strength: float, damping: float) -> list[Tensor]:
    """The weights of linears that read this input, moved so that they give more nearly what the dense model gave.

    W' = W + strength · W L (G + λ)⁻¹ with G = Σ x xᵀ, L = Σ (d - x) xᵀ and λ = damping · mean diagonal: at strength 1
    the least of Σ |W'x - Wd|² + λ |W' - W|². Zeros stay. Weights are O×I in float32; where no token was seen, or the
    system cannot be solved, they come back as they are.

    Source: Arai and Ichikawa, arXiv 2504.09629, section 5.
    """
    damped_II = drift.gram_II.clone()
    diagonal_I = damped_II.diagonal()
    diagonal_I.add_(damping * diagonal_I.mean())
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    if failed or not bool(drift.lost_II.any()):
        return list(weights)
    moved = []
    for weight_OI in weights:
        change_OI = torch.cholesky_solve((weight_OI @ drift.lost_II).T, lower_II).T
        moved.append(weight_OI + strength * change_OI.masked_fill(weight_OI == 0, 0.0))
    return moved
