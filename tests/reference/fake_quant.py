"""The gradients of learned step sizes, one weight at a time in float64, as LSQ and LSQ+ write them down."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmcompress.numerics.grid import Fitted, Grid


def nearest_of(grid: Grid) -> tuple[Callable[[float], float], float, float]:
    """Rounding to the nearest value, and how far it reaches: half of the last gap beyond the outermost values."""
    if grid.number is None:
        low, high = grid.low, grid.high
        return lambda v: float(min(max(round(v), low), high)), low - 0.5, high + 0.5
    codes = torch.arange(grid.number.low, grid.number.low + 2**grid.bits).to(torch.int8)
    values = sorted({v for v in grid.number.decode(codes, torch.float64).tolist() if abs(v) < float("inf")})
    low, high = values[0] - (values[1] - values[0]) / 2, values[-1] + (values[-1] - values[-2]) / 2
    return lambda v: min(values, key=lambda each: abs(each - v)), low, high


def one_by_one(
    weight_OI: Tensor, fitted: Fitted, outer_OI: Tensor, *, clip: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, and the gradients of Σ outer · value for weights, scales and zero points."""
    grid = fitted.grid
    nearest, low, high = nearest_of(grid)
    value, d_weight = torch.zeros_like(weight_OI), torch.zeros_like(weight_OI)
    d_scale, d_zero = torch.zeros_like(fitted.scale_OG), torch.zeros_like(fitted.zero_OG)
    for o in range(weight_OI.shape[0]):
        for i in range(weight_OI.shape[1]):
            row, group = (0 if grid.scales.single else o), i // grid.length(weight_OI.shape[1])
            scale, zero = float(fitted.scale_OG[row, group]), float(fitted.zero_OG[row, group])
            outer, v = float(outer_OI[o, i]), float(weight_OI[o, i]) / scale + zero
            q = nearest(v)
            value[o, i] = (q - zero) * scale
            if low <= v <= high or not clip:
                d_weight[o, i] = outer
                d_scale[row, group] += outer * (q - v)
            else:
                d_scale[row, group] += outer * (q - zero)
                d_zero[row, group] += outer * -scale
    return value, d_weight, d_scale, d_zero


def surrogate(weight_OI: Tensor, fitted: Fitted, at: tuple[Tensor, Fitted]) -> Tensor:
    """What the gradient is the true gradient of: rounding adds what it adds at the point `at`, clipping is real."""
    grid, inputs = fitted.grid, weight_OI.shape[1]
    nearest, low, high = nearest_of(grid)

    def wide(each_OG: Tensor) -> Tensor:
        rows = each_OG.expand(len(weight_OI), -1)
        return rows.repeat_interleave(grid.length(inputs), dim=1)[:, :inputs]

    first_OI = at[0] / wide(at[1].scale_OG) + wide(at[1].zero_OG)
    rounded_OI = torch.tensor([[nearest(v) for v in row] for row in first_OI.tolist()], dtype=torch.float64)
    here_OI = weight_OI / wide(fitted.scale_OG) + wide(fitted.zero_OG)
    inside_OI = (first_OI >= low) & (first_OI <= high)
    codes_OI = torch.where(inside_OI, here_OI + (rounded_OI - first_OI), rounded_OI)
    return (codes_OI - wide(fitted.zero_OG)) * wide(fitted.scale_OG)
