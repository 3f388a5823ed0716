"""Scales and zero points of every group: min-max ranges, and the search for those with the least error.

O = outputs, I = inputs, G = groups of inputs, N = group length.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llmcompress.numerics.formats import (
    E4M3,
    POWER_OF_TWO,
    STORED,
    TWO_LEVEL,
    NumberFormat,
    power_of_two,
    shared_scale,
)
from llmcompress.numerics.grid import Fitted, Grid, grouped, row_pieces
from llmcompress.numerics.rounding_error import per_scale, rounding_error, seen_by_groups
from llmcompress.numerics.super_blocks import chosen_super_blocks, per_super_block, with_super_blocks

RangeSearch = Literal["minmax", "mse", "joint"]
"""Cover a group's whole range, or the shrunken range with the least rounding error; joint: besides, scales with every
zero point near the middle, or with either sign."""


def fit(
    weight_OI: Tensor,
    grid: Grid,
    *,
    scale_dtype: torch.dtype = torch.float32,
    search: RangeSearch = "minmax",
    gram_II: Tensor | None = None,
    shared: Tensor | None = None,
) -> Fitted:
    """Scales and zero points of every group, for weights in float32.

    Scales are rounded to `scale_dtype` (or to what the grid's kind of scale allows) before anything is rounded with
    them, so what is computed here is what a loader of the saved model computes. A group of zeros gets scale 1; scales
    of symmetric grids below 8 bits may be negative (`Grid.mirrors`).

    With `search="mse"` the range shrinks down to half, in coarse steps and then in fine ones around the best (float
    grids also widen it). The full range is one of the candidates. The error is that of the group's part of the output
    when `gram_II` is given (AWQ's clipping), plain squared error otherwise. In groups wider than 256, whole rows above
    all, errors of inputs are taken as independent there: ten products with the whole matrix would cost more than all
    else that is done to a site. `shared` is for a part of a matrix whose two-level scales have been begun.

    With `search="joint"` thirteen scales are tried after that, each with both signs or with three zero points: two to
    four times the trials. Grids of floats have neither.

    In super-blocks the search also makes minima real numbers, and looks for the best integers (`with_super_blocks`).

    A ternary grid has no range to cover: its scale is the mean magnitude of what is not zero, and a search widens it.

    Source: Jacob et al., arXiv 1712.05877, section 2 (range includes 0, zero is exact); Ma et al., arXiv 2402.17764
    (ternary: mean magnitude);
    Lin et al., arXiv 2306.00978 (clipping per row and group).
    """
    if grid.scales.super_block is not None:
        free = fit(weight_OI, replace(grid, scales=STORED), search=search, gram_II=gram_II)
        gram_GNN = None if gram_II is None else seen_by_groups(gram_II, grid)
        return with_super_blocks(weight_OI, free, grid, gram_GNN=gram_GNN, refine=search != "minmax")
    grouped_OGN = grouped(weight_OI, grid)
    top_OG = grouped_OGN.amax(-1).clamp_min(0)
    bottom_OG = grouped_OGN.amin(-1).clamp_max(0)
    if grid.ternary:
        # zeros are a mask, or fill up a short group
        top_OG = grouped_OGN.abs().sum(-1) / grouped_OGN.count_nonzero(-1).clamp_min(1)
        bottom_OG = -top_OG
    if grid.scales.single:
        top_OG, bottom_OG = top_OG.amax(0, keepdim=True), bottom_OG.amin(0, keepdim=True)
    if grid.scales == TWO_LEVEL and shared is None:
        assert grid.number is not None, "integers have one level of scales"
        shared = shared_scale(torch.maximum(top_OG.max(), -bottom_OG.min()), grid.number)
    best = _from_range(bottom_OG, top_OG, grid, scale_dtype, shared)
    if search == "minmax":
        return best
    gram_GNN = None if gram_II is None else seen_by_groups(gram_II, grid)
    ranges = _Ranges(bottom_OG, top_OG, scale_dtype, shared)

    def searched(weight_OGN: Tensor, ranges: _Ranges, first: Fitted) -> Fitted:
        found = _search(weight_OGN, ranges, first, gram_GNN)
        jointly = search == "joint" and grid.number is None
        return _search_jointly(weight_OGN, ranges, found, gram_GNN) if jointly else found

    if grid.scales.single:
        return searched(grouped_OGN, ranges, best)
    # rows are independent: in pieces, a trial needs little memory besides the weights
    found = [searched(grouped_OGN[piece], ranges.rows(piece), best.rows(piece)) for piece in row_pieces(weight_OI)]
    return replace(
        best,
        scale_OG=torch.cat([each.scale_OG for each in found]),
        zero_OG=torch.cat([each.zero_OG for each in found]),
    )


def lesser(first: Fitted, second: Fitted, error_first_OG: Tensor, error_second_OG: Tensor) -> Fitted:
    """Of two fits of the same weights, for every scale the one with the lesser error; the second where equal.

    Errors may be O×1, then whole rows are taken; groups that share a scale use the sum, those of a super-block too.
    """
    if first.grid.scales.super_block is not None:
        better_OS = _by_super_block(error_first_OG, first.grid) < _by_super_block(error_second_OG, first.grid)
        return chosen_super_blocks(first, second, better_OS)
    better_OG = per_scale(error_first_OG, first.grid) < per_scale(error_second_OG, first.grid)
    return replace(
        second,
        scale_OG=torch.where(better_OG, first.scale_OG, second.scale_OG),
        zero_OG=torch.where(better_OG, first.zero_OG, second.zero_OG),
    )


def _by_super_block(error_OG: Tensor, grid: Grid) -> Tensor:
    return error_OG if error_OG.shape[1] == 1 else per_super_block(error_OG, grid)


def _steps(grid: Grid) -> tuple[tuple[float, ...], ...]:
    """What a search adds to the factor of a range: first to 1, then to the best found."""
    if grid.scales == POWER_OF_TWO:
        return ((1.0, -0.5),)
    if grid.ternary:
        return _WIDER
    # values of a float lie wide apart at its end: the largest weight may be better off on 4 instead of 6, which for
    # NVFP4 is known as Four over Six (as in ModelOpt 0.46)
    return (_COARSE if grid.number is None else (0.5, *_COARSE), _FINE)


_COARSE = (-0.15, -0.3, -0.45)
_FINE = (-0.05, 0.05)
_WIDER = ((0.25, 0.5, 0.75), (-0.125, 0.125))
"""Of normal weights the best ternary scale is 1.53 times their mean magnitude."""
_JOINT_FACTORS = tuple(0.4 + 0.06 * step for step in range(13))
_NARROWEST, _WIDEST = 0.5, 2.0


class _Ranges(NamedTuple):
    """What every group covers before its range shrinks, and how scales are made of it."""

    bottom_OG: Tensor
    top_OG: Tensor
    scale_dtype: torch.dtype
    shared: Tensor | None

    def rows(self, piece: slice) -> _Ranges:
        return self._replace(bottom_OG=self.bottom_OG[piece], top_OG=self.top_OG[piece])


def _search(grouped_OGN: Tensor, ranges: _Ranges, best: Fitted, gram_GNN: Tensor | None) -> Fitted:
    bottom_OG, top_OG, scale_dtype, shared = ranges
    grid = best.grid
    best_error_OG = rounding_error(grouped_OGN, best, gram_GNN)
    factor_OG = torch.ones_like(top_OG)
    for steps in _steps(grid):
        around_OG = factor_OG
        for step in steps:
            tried_OG = (around_OG + step).clamp(_NARROWEST, _WIDEST)
            trial = _from_range(bottom_OG * tried_OG, top_OG * tried_OG, grid, scale_dtype, shared)
            error_OG = rounding_error(grouped_OGN, trial, gram_GNN)
            best = lesser(trial, best, error_OG, best_error_OG)
            factor_OG = torch.where(error_OG < best_error_OG, tried_OG, factor_OG)
            best_error_OG = torch.where(error_OG < best_error_OG, error_OG, best_error_OG)
    return best


def _search_jointly(grouped_OGN: Tensor, ranges: _Ranges, best: Fitted, gram_GNN: Tensor | None) -> Fitted:
    """The best of many scales, each with both signs or with several zero points; or `best`.

    Source: the search of Lin et al., arXiv 2505.17595 (NeUQI). Differs: a fixed list of scales and integer zero points.
    """
    full = _from_range(ranges.bottom_OG, ranges.top_OG, best.grid, ranges.scale_dtype, ranges.shared)
    middle_OG = (grouped_OGN.amax(-1) + grouped_OGN.amin(-1)) / 2
    best_error_OG = rounding_error(grouped_OGN, best, gram_GNN)
    for factor in _JOINT_FACTORS:
        scale_OG = (full.scale_OG * factor).to(ranges.scale_dtype).to(full.scale_OG.dtype)
        scale_OG = torch.where(scale_OG != 0, scale_OG, full.scale_OG)
        for trial in _same_scale(replace(full, scale_OG=scale_OG), middle_OG):
            error_OG = rounding_error(grouped_OGN, trial, gram_GNN)
            best = lesser(trial, best, error_OG, best_error_OG)
            best_error_OG = torch.minimum(error_OG, best_error_OG)
    return best


def _same_scale(trial: Fitted, middle_OG: Tensor) -> list[Fitted]:
    """Grids with that step: the extra code on either side of zero, or zero points around the middle of the weights."""
    grid = trial.grid
    if grid.mirrors:
        return [trial, replace(trial, scale_OG=-trial.scale_OG)]
    if grid.symmetric:
        return [trial]
    centre_OG = ((grid.low + grid.high) / 2 - middle_OG / trial.scale_OG).round()
    return [replace(trial, zero_OG=(centre_OG + by).clamp(grid.low, grid.high)) for by in (-1, 0, 1)]


def _from_range(
    bottom_OG: Tensor, top_OG: Tensor, grid: Grid, scale_dtype: torch.dtype, shared: Tensor | None
) -> Fitted:
    if grid.number is not None:
        scale_OG = _float_scale(torch.maximum(top_OG, -bottom_OG), grid, grid.number, scale_dtype, shared)
        return Fitted(grid, scale_OG, torch.zeros_like(scale_OG), shared)
    if grid.symmetric:
        # the extreme weight lands on an outermost code: with the usual (2^b - 1) / 2 steps it would lie half-way
        # between a code and one that does not exist
        span_OG = torch.maximum(bottom_OG / grid.low, top_OG / grid.high)
        if grid.mirrors:
            mirrored_OG = torch.maximum(top_OG / -grid.low, bottom_OG / -grid.high)
            span_OG = torch.where(mirrored_OG < span_OG, -mirrored_OG, span_OG)
    else:
        span_OG = (top_OG - bottom_OG) / (grid.high - grid.low)
    scale_OG = span_OG.to(scale_dtype).to(span_OG.dtype)
    scale_OG = torch.where(scale_OG != 0, scale_OG, torch.ones_like(scale_OG))
    if grid.symmetric:
        return Fitted(grid, scale_OG, torch.zeros_like(scale_OG))
    return Fitted(grid, scale_OG, (grid.low - bottom_OG / scale_OG).round().clamp(grid.low, grid.high))


def _float_scale(
    largest_OG: Tensor, grid: Grid, number: NumberFormat, scale_dtype: torch.dtype, shared: Tensor | None
) -> Tensor:
    """What brings the largest magnitude of each group to the number format's reach, as its kind of scale says it."""
    one = torch.ones_like(largest_OG)
    if grid.scales == POWER_OF_TWO:
        scale_OG = power_of_two(largest_OG, number.exponent, scale_dtype)
    elif shared is not None:
        # a group too quiet for E4M3 gets its smallest value: 0 would lose it, 1 would be far too coarse
        local_OG = E4M3.nearest(largest_OG / number.reach * shared).clamp_min(2.0**-9)
        scale_OG = local_OG / shared
    else:
        scale_OG = (largest_OG / number.reach).to(scale_dtype).to(largest_OG.dtype)
    return torch.where((scale_OG > 0) & (largest_OG > 0), scale_OG, one if shared is None else one / shared)
