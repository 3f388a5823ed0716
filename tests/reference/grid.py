"""Rounding to an integer grid, one weight at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.numerics.grid import Grid


def scale_and_zero(values: list[float], grid: Grid) -> tuple[float, int]:
    """Scale and zero point of one group."""
    top, bottom = max([0.0, *values]), min([0.0, *values])
    scale = max(bottom / grid.low, top / grid.high) if grid.symmetric else (top - bottom) / (grid.high - grid.low)
    if grid.symmetric and grid.bits < 8:  # values seen in a mirror: the side with one code more is the other one
        mirrored = max(-top / grid.low, -bottom / grid.high)
        scale = -mirrored if mirrored < scale else scale
    scale = scale or 1.0
    zero = 0 if grid.symmetric else round(grid.low - bottom / scale)
    return scale, min(max(zero, grid.low), grid.high)


def round_one_by_one(weight_OI: Tensor, grid: Grid) -> Tensor:
    """Every weight's nearest grid value."""
    result = torch.zeros_like(weight_OI)
    length = grid.length(weight_OI.shape[1])
    for o, row in enumerate(weight_OI.tolist()):
        for start in range(0, len(row), length):
            scale, zero = scale_and_zero(row[start : start + length], grid)
            for i, value in enumerate(row[start : start + length], start):
                code = min(max(round(value / scale + zero), grid.low), grid.high)
                result[o, i] = (code - zero) * scale
    return result
