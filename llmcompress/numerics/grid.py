"""Integer grids: fit scales, round, restore. O = outputs, I = inputs, G = groups of inputs, N = group length.

Codes are signed in both modes, `-2^(b-1) … 2^(b-1)-1`, as compressed-tensors stores them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Which integers a weight may become, and how many inputs share a scale (`group=None`: the whole row)."""

    bits: int
    symmetric: bool = True
    group: int | None = None

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def groups(self, inputs: int) -> int:
        """Number of scales a row of `inputs` weights has; a ragged last group counts."""
        return 1 if self.group is None else -(-inputs // self.group)

    def length(self, inputs: int) -> int:
        """Weights under one scale."""
        return inputs if self.group is None else self.group


@dataclass(frozen=True)
class Fitted:
    """A grid with its numbers: `scale_OG` (float32 holding values of the stored type), `zero_OG` (float32 integers)."""

    grid: Grid
    scale_OG: Tensor
    zero_OG: Tensor


def fit(
    weight_OI: Tensor,
    grid: Grid,
    *,
    scale_dtype: torch.dtype = torch.float32,
    search: Literal["minmax", "mse"] = "minmax",
    importance_I: Tensor | None = None,
) -> Fitted:
    """Scales and zero points that cover each group's range, or the shrunken range of least squared error.

    Scales are rounded to `scale_dtype` before anything is rounded with them, so what is computed here is what a
    loader of the saved model computes. A group of zeros gets scale 1. `importance_I` weighs the squared errors.

    Source: Jacob et al., arXiv 1712.05877, section 2 (range includes 0, zero is exact).
    """
    grouped_OGN = _grouped(weight_OI, grid)
    top_OG = grouped_OGN.amax(-1).clamp_min(0)
    bottom_OG = grouped_OGN.amin(-1).clamp_max(0)
    best = _from_range(bottom_OG, top_OG, grid, scale_dtype)
    if search == "minmax":
        return best
    weights_OGN = None if importance_I is None else _grouped(importance_I[None], grid)
    best_error_OG = _error(grouped_OGN, best, weights_OGN)
    for step in range(1, 20):
        shrink = 1 - step / 40
        trial = _from_range(bottom_OG * shrink, top_OG * shrink, grid, scale_dtype)
        error_OG = _error(grouped_OGN, trial, weights_OGN)
        better_OG = error_OG < best_error_OG
        best_error_OG = torch.where(better_OG, error_OG, best_error_OG)
        best = Fitted(
            grid,
            torch.where(better_OG, trial.scale_OG, best.scale_OG),
            torch.where(better_OG, trial.zero_OG, best.zero_OG),
        )
    return best


def round_to_codes(weight_OI: Tensor, fitted: Fitted) -> Tensor:
    """Nearest codes, as int8."""
    inputs = weight_OI.shape[1]
    scale_OI, zero_OI = spread(fitted.scale_OG, fitted.grid, inputs), spread(fitted.zero_OG, fitted.grid, inputs)
    return (weight_OI / scale_OI + zero_OI).round_().clamp_(fitted.grid.low, fitted.grid.high).to(torch.int8)


def restore(codes_OI: Tensor, fitted: Fitted) -> Tensor:
    """The float weights that codes stand for, in the scales' dtype."""
    inputs = codes_OI.shape[1]
    scale_OI, zero_OI = spread(fitted.scale_OG, fitted.grid, inputs), spread(fitted.zero_OG, fitted.grid, inputs)
    return (codes_OI.to(scale_OI.dtype) - zero_OI) * scale_OI


def spread(per_group_OG: Tensor, grid: Grid, inputs: int) -> Tensor:
    """One value per input instead of one per group."""
    if grid.group is None:
        return per_group_OG
    return per_group_OG.repeat_interleave(grid.group, dim=1)[:, :inputs]


def _grouped(weight_OI: Tensor, grid: Grid) -> Tensor:
    """O×I → O×G×N; a ragged last group is filled with zeros, which no range or error notices."""
    outputs, inputs = weight_OI.shape
    length = grid.length(inputs)
    missing = grid.groups(inputs) * length - inputs
    return torch.nn.functional.pad(weight_OI, (0, missing)).view(outputs, -1, length)


def _from_range(bottom_OG: Tensor, top_OG: Tensor, grid: Grid, scale_dtype: torch.dtype) -> Fitted:
    steps = 2**grid.bits - 1
    span_OG = 2 * torch.maximum(-bottom_OG, top_OG) if grid.symmetric else top_OG - bottom_OG
    scale_OG = (span_OG / steps).to(scale_dtype).float()
    scale_OG = torch.where(scale_OG > 0, scale_OG, torch.ones_like(scale_OG))
    if grid.symmetric:
        return Fitted(grid, scale_OG, torch.zeros_like(scale_OG))
    return Fitted(grid, scale_OG, (grid.low - bottom_OG / scale_OG).round().clamp(grid.low, grid.high))


def _error(grouped_OGN: Tensor, fitted: Fitted, weights_OGN: Tensor | None) -> Tensor:
    scale, zero = fitted.scale_OG[..., None], fitted.zero_OG[..., None]
    codes = (grouped_OGN / scale + zero).round_().clamp_(fitted.grid.low, fitted.grid.high)
    squared = codes.sub_(zero).mul_(scale).sub_(grouped_OGN).square_()
    return (squared if weights_OGN is None else squared * weights_OGN).sum(-1)
