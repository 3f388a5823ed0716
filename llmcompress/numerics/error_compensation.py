"""Adjusts weights to compensate for errors in their inputs. O = outputs, I = inputs, T = tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LOUD = 4.0
"""A token counts as if its input were at most this many times as strong (squared) as the median token's."""


class _Sums(NamedTuple):
    gram_II: Tensor
    """Σ x xᵀ."""
    lost_II: Tensor
    """Σ (d - x) xᵀ."""


class Drift:
    """What a linear's input lost: sums over tokens, d being the input in the dense model and x what it is now.

    Tokens far louder than the others weigh as much as a loud one: at the first token of a window some channels are
    thousands of times their usual size, and weights fitted to that one token are wrong for all others. The sums are
    kept by halves of every batch, so that what is fitted on one half of the tokens can be tried on the other.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        empty = torch.zeros(2, 2, inputs, inputs, dtype=torch.float32, device=device)
        self.halves = (_Sums(*empty[0]), _Sums(*empty[1]))

    def add(self, dense_TI: Tensor, x_TI: Tensor) -> None:
        """Take in a batch of tokens, the same in the same order."""
        loudness_T = dense_TI.square().sum(1)
        weight_T = (LOUD * loudness_T.median() / loudness_T.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1.0)
        weighted_TI, lost_TI = x_TI * weight_T[:, None], dense_TI - x_TI
        middle = -(-len(x_TI) // 2)
        for half, tokens in zip(self.halves, (slice(middle), slice(middle, None)), strict=True):
            half.gram_II.addmm_(weighted_TI[tokens].T, x_TI[tokens])
            half.lost_II.addmm_(lost_TI[tokens].T, weighted_TI[tokens])


def compensated(weights: Sequence[Tensor], drift: Drift, *, strength: float, damping: float) -> list[Tensor]:
    """The weights of linears that read this input, moved so that they give more nearly what the dense model gave.

    W' = W + s · W L (G + λ)⁻¹ with G = Σ x xᵀ, L = Σ (d - x) xᵀ and λ = damping · mean diagonal. At s = 1 that is the
    least of Σ |W'x - Wd|² + λ |W' - W|² on these tokens. s is at most `strength`, and the share at which weights moved
    by one half of the tokens err least on the other half: 0 where nothing carries over. Zeros stay. Weights are O×I in
    float32; where no token was seen, or the system cannot be solved, they come back as they are.

    Source: Arai and Ichikawa, arXiv 2504.09629, section 5. Differs: s is found for each linear.
    """
    first, second = drift.halves
    whole = _Sums(first.gram_II + second.gram_II, first.lost_II + second.lost_II)
    factors = [_damped_factor(each.gram_II, damping) for each in (first, second, whole)]
    if not bool(whole.lost_II.any()) or any(factor is None for factor in factors):
        return list(weights)
    of_first, of_second, of_whole = (factor for factor in factors if factor is not None)
    moved = []
    for weight_OI in weights:
        tried = ((first, of_first, second), (second, of_second, first))
        gains = [_gain(weight_OI, _change(weight_OI, fitted, factor), other) for fitted, factor, other in tried]
        gain, cost = (sum(each) for each in zip(*gains, strict=True))
        share = min(strength, max(0.0, gain / cost)) if cost > 0 else 0.0
        moved.append(weight_OI + share * _change(weight_OI, whole, of_whole))
    return moved


def _damped_factor(gram_II: Tensor, damping: float) -> Tensor | None:
    """Lower Cholesky factor; None where there is none."""
    damped_II = gram_II.clone()
    diagonal_I = damped_II.diagonal()
    diagonal_I.add_(damping * diagonal_I.mean())
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    return None if failed else lower_II


def _change(weight_OI: Tensor, fitted: _Sums, lower_II: Tensor) -> Tensor:
    """The whole way, where weights are not zero."""
    change_OI = torch.cholesky_solve((weight_OI @ fitted.lost_II).T, lower_II).T
    return change_OI.masked_fill(weight_OI == 0, 0.0)


def _gain(weight_OI: Tensor, change_OI: Tensor, other: _Sums) -> tuple[float, float]:
    """How the squared error Σ |(W + s ΔW) x - W d|² on other tokens falls with s, halved, and what s² costs."""
    gain = ((weight_OI @ other.lost_II) * change_OI).sum(dtype=torch.float64)
    cost = ((change_OI @ other.gram_II) * change_OI).sum(dtype=torch.float64)
    return float(gain), float(cost)
