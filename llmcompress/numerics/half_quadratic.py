"""HQQ's solver for scales and zero points, without data. O = outputs, G = groups, N = group length.

Errors count by a power below one of their size: many small ones cost more than a few large ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmcompress.numerics.formats import STORED
from llmcompress.numerics.grid import Fitted, Grid, grouped
from llmcompress.numerics.ranges import fit, lesser
from llmcompress.numerics.super_blocks import with_super_blocks


def half_quadratic_fit(
    weight_OI: Tensor,
    grid: Grid,
    *,
    scale_dtype: torch.dtype = torch.float32,
    power: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    steps: int = 20,
) -> Fitted:
    """The fit with the least Σ |W - Ŵ|^power of every group that alternating finds, the full range among them.

    In turns: codes for the scales; errors that are allowed to stay (the shrinkage of the residuals); zero point and
    scale by least squares for the rest. Weights are float32, the grid one of integers.

    Source: Badri and Shaji, 2023 (HQQ). Differs: residuals are measured in steps of the grid, not in the weights' own
    unit, in which their default shrinks everything to nothing; zero points are whole numbers, as checkpoints store
    them, so the scale is solved for too.
    """
    assert grid.number is None, "half-quadratic fits are made for integers"
    if grid.scales.super_block is not None:  # quantized at the end, as they are
        free = half_quadratic_fit(
            weight_OI, replace(grid, scales=STORED), power=power, beta=beta, growth=growth, steps=steps
        )
        return with_super_blocks(weight_OI, free, grid, refine=False)
    weight_OGN, there_GN = grouped(weight_OI, grid), _there(weight_OI, grid)
    best = current = fit(weight_OI, grid, scale_dtype=scale_dtype)
    best_error_OG = _error(weight_OGN, best, power)
    for _ in range(steps):
        current = _turn(weight_OGN, there_GN, current, scale_dtype=scale_dtype, power=power, beta=beta)
        error_OG = _error(weight_OGN, current, power)
        best = lesser(current, best, error_OG, best_error_OG)
        best_error_OG = torch.minimum(error_OG, best_error_OG)
        beta *= growth
    return best


def shrink(residual: Tensor, *, power: float, beta: float) -> Tensor:
    """What of each residual may stay: the e with the least |e|^power + beta/2 (e - residual)², by its threshold.

    Source: as above, equation for W_e.
    """
    size = residual.abs()
    return residual.sign() * (size - size.clamp_min(1e-12).pow(power - 1) / beta).clamp_min(0)


def _turn(
    weight_OGN: Tensor, there_GN: Tensor, now: Fitted, *, scale_dtype: torch.dtype, power: float, beta: float
) -> Fitted:
    scale, zero, grid = now.scale_OG[..., None], now.zero_OG[..., None], now.grid
    steps_OGN = weight_OGN / scale
    codes_OGN = (steps_OGN + zero).round().clamp(grid.low, grid.high)
    aim_OGN = steps_OGN - shrink(steps_OGN - (codes_OGN - zero), power=power, beta=beta)
    if not grid.symmetric:
        zero = ((codes_OGN - aim_OGN) * there_GN).sum(-1, keepdim=True) / there_GN.sum(-1, keepdim=True)
        zero = zero.round().clamp(grid.low, grid.high)
    spread_OGN = (codes_OGN - zero) * there_GN
    power_OG = spread_OGN.square().sum(-1)
    scale_OG = now.scale_OG * (aim_OGN * spread_OGN).sum(-1) / power_OG.clamp_min(1e-12)
    scale_OG = scale_OG.to(scale_dtype).to(scale_OG.dtype)
    kept_OG = torch.where((power_OG > 0) & (scale_OG * now.scale_OG > 0), scale_OG, now.scale_OG)
    return replace(now, scale_OG=kept_OG, zero_OG=zero[..., 0])


def _error(weight_OGN: Tensor, fitted: Fitted, power: float) -> Tensor:
    scale, zero, grid = fitted.scale_OG[..., None], fitted.zero_OG[..., None], fitted.grid
    codes_OGN = (weight_OGN / scale + zero).round().clamp(grid.low, grid.high)
    return ((codes_OGN - zero) * scale - weight_OGN).abs().pow(power).sum(-1)


def _there(weight_OI: Tensor, grid: Grid) -> Tensor:
    """1 where a group has a weight, 0 where a ragged last one is filled up: G×N."""
    return grouped(torch.ones_like(weight_OI[:1]), grid)[0]
