"""Grids of values: fit scales, round, restore. O = outputs, I = inputs, G = groups of inputs, N = group length.

Integer codes are signed in both modes, `-2^(b-1) … 2^(b-1)-1`, as compressed-tensors stores them; codes of other
numbers are what their format says (`numerics/formats.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from llmcompress.numerics.formats import (
    E4M3,
    POWER_OF_TWO,
    STORED,
    TWO_LEVEL,
    NumberFormat,
    ScaleKind,
    power_of_two,
    shared_scale,
)

RangeSearch = Literal["minmax", "mse"]
"""Cover a group's whole range, or the shrunken range whose rounding error is least."""


@dataclass(frozen=True)
class Grid:
    """Which values a weight may become, and how many inputs share a scale (`group=None`: the whole row)."""

    bits: int
    symmetric: bool = True
    group: int | None = None
    number: NumberFormat | None = None
    """What is scaled: a float format; None: integers. Only integers can be asymmetric."""
    scales: ScaleKind = STORED

    @classmethod
    def of(cls, number: NumberFormat, group: int | None = None, scales: ScaleKind = STORED) -> Grid:
        """A grid of floats."""
        return cls(number.bits, True, group, number, scales)

    @property
    def low(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.number is None else self.number.low

    @property
    def high(self) -> int:
        """Largest code."""
        return self.low + (1 << self.bits) - 1

    def groups(self, inputs: int) -> int:
        """Number of scales a row of `inputs` weights has; a ragged last group counts."""
        return 1 if self.group is None else -(-inputs // self.group)

    def length(self, inputs: int) -> int:
        """Weights under one scale."""
        return inputs if self.group is None else self.group

    def scale_shape(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Shape of `scale_OG`: one row when all outputs share the scale."""
        return (1 if self.scales.single else outputs, self.groups(inputs))

    def scale_bits(self, outputs: int, inputs: int, checkpoint_bits: int) -> int:
        """Stored bits of all scales and zero points of a matrix."""
        rows, groups = self.scale_shape(outputs, inputs)
        one = self.scales.width(checkpoint_bits) + (0 if self.symmetric else self.bits)
        return rows * groups * one + self.scales.shared_bits


@dataclass(frozen=True)
class Fitted:
    """A grid with its numbers: `scale_OG` holds values of the stored type, `zero_OG` integers, as floats both.

    `shared` (float32, one element) is what the E4M3 values of two-level scales were divided by.
    """

    grid: Grid
    scale_OG: Tensor
    zero_OG: Tensor
    shared: Tensor | None = None

    @classmethod
    def of_stored(cls, grid: Grid, stored_OG: Tensor, zero_OG: Tensor | None, shared: Tensor | None) -> Fitted:
        """From scales as they are stored."""
        scale_OG = stored_OG if shared is None else stored_OG.float() / shared
        return cls(
            grid, scale_OG, torch.zeros_like(scale_OG) if zero_OG is None else zero_OG.to(scale_OG.dtype), shared
        )

    def stored_OG(self) -> Tensor:
        """The scales as they are stored: of two levels, the E4M3 values."""
        return self.scale_OG if self.shared is None else E4M3.nearest(self.scale_OG * self.shared)


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
    them, so what is computed here is what a loader of the saved model computes. A group of zeros gets scale 1.

    With `search="mse"` the range shrinks down to half, in coarse steps and then in fine ones around the best (float
    grids also widen it). The full range is one of the candidates. The error is that of the group's part of the output
    when `gram_II` is given (AWQ's clipping), plain squared error otherwise. In groups wider than 256, whole rows above
    all, errors of inputs are taken as independent there: ten products with the whole matrix would cost more than all
    else that is done to a site. `shared` is for a part of a matrix whose two-level scales have been begun.

    Source: Jacob et al., arXiv 1712.05877, section 2 (range includes 0, zero is exact);
    Lin et al., arXiv 2306.00978 (clipping per row and group).
    """
    grouped_OGN = _grouped(weight_OI, grid)
    top_OG = grouped_OGN.amax(-1).clamp_min(0)
    bottom_OG = grouped_OGN.amin(-1).clamp_max(0)
    if grid.scales.single:
        top_OG, bottom_OG = top_OG.amax(0, keepdim=True), bottom_OG.amin(0, keepdim=True)
    if grid.scales == TWO_LEVEL and shared is None:
        assert grid.number is not None, "integers have one level of scales"
        shared = shared_scale(torch.maximum(top_OG.max(), -bottom_OG.min()), grid.number)
    best = _from_range(bottom_OG, top_OG, grid, scale_dtype, shared)
    if search == "minmax":
        return best
    gram_GNN = None if gram_II is None else _seen_by_groups(gram_II, grid)
    best_error_OG = _error(grouped_OGN, best, gram_GNN)
    factor_OG = torch.ones_like(top_OG)
    for steps in _steps(grid):
        around_OG = factor_OG
        for step in steps:
            tried_OG = (around_OG + step).clamp(_NARROWEST, _WIDEST)
            trial = _from_range(bottom_OG * tried_OG, top_OG * tried_OG, grid, scale_dtype, shared)
            error_OG = _error(grouped_OGN, trial, gram_GNN)
            best = lesser(trial, best, error_OG, best_error_OG)
            factor_OG = torch.where(error_OG < best_error_OG, tried_OG, factor_OG)
            best_error_OG = torch.where(error_OG < best_error_OG, error_OG, best_error_OG)
    return best


def lesser(first: Fitted, second: Fitted, error_first_OG: Tensor, error_second_OG: Tensor) -> Fitted:
    """Of two fits of the same weights, for every scale the one with the lesser error; the second where equal.

    Errors may be O×1, then whole rows are taken; what shares a scale is judged by its sum.
    """
    better_OG = _per_scale(error_first_OG, first.grid) < _per_scale(error_second_OG, first.grid)
    return replace(
        second,
        scale_OG=torch.where(better_OG, first.scale_OG, second.scale_OG),
        zero_OG=torch.where(better_OG, first.zero_OG, second.zero_OG),
    )


def round_to_codes(weight_OI: Tensor, fitted: Fitted) -> Tensor:
    """Nearest codes, as int8."""
    grid, inputs = fitted.grid, weight_OI.shape[1]
    scale_OI = spread(fitted.scale_OG, grid, inputs)
    if grid.number is not None:
        return grid.number.encode(weight_OI / scale_OI)
    zero_OI = spread(fitted.zero_OG, grid, inputs)
    return (weight_OI / scale_OI + zero_OI).round_().clamp_(grid.low, grid.high).to(torch.int8)


def restore(codes_OI: Tensor, fitted: Fitted) -> Tensor:
    """The float weights that codes stand for, in the scales' dtype."""
    grid, inputs = fitted.grid, codes_OI.shape[1]
    scale_OI = spread(fitted.scale_OG, grid, inputs)
    if grid.number is not None:
        # one rounding, of the product: table values and two-level scales have no exact form in 16 bits
        work = torch.promote_types(scale_OI.dtype, torch.float32)
        return (grid.number.decode(codes_OI, work) * scale_OI.to(work)).to(scale_OI.dtype)
    zero_OI = spread(fitted.zero_OG, grid, inputs)
    return (codes_OI.to(scale_OI.dtype) - zero_OI) * scale_OI


def spread(per_group_OG: Tensor, grid: Grid, inputs: int) -> Tensor:
    """One value per input instead of one per group (broadcastable when the row is one group)."""
    if grid.group is None:
        return per_group_OG
    return per_group_OG.repeat_interleave(grid.group, dim=1)[:, :inputs]


def output_error(difference_OI: Tensor, gram_II: Tensor) -> Tensor:
    """Σ over tokens and outputs of (ΔW x)², from the Gram matrix alone: tr(ΔW G ΔWᵀ)."""
    return row_errors(difference_OI, gram_II).sum(dtype=torch.float64)


def row_errors(difference_OI: Tensor, gram_II: Tensor) -> Tensor:
    """The same for every output by itself."""
    error_O = difference_OI.new_zeros(len(difference_OI))
    # the matrix is symmetric: what lies right of the diagonal counts twice, what lies left of it is never multiplied
    for start, stop in stripes(len(gram_II)):
        seen = difference_OI[:, start:stop] @ gram_II[start:stop, start:]
        seen[:, stop - start :] *= 2
        error_O += seen.mul_(difference_OI[:, start:]).sum(1)
    return error_O


def stripes(inputs: int) -> list[tuple[int, int]]:
    """Start and end of the stripes in which a symmetric matrix is worked on: about eight, none too thin to be fast."""
    width = max(256, -(-inputs // 8))
    return [(start, min(start + width, inputs)) for start in range(0, inputs, width)]


def _grouped(weight_OI: Tensor, grid: Grid) -> Tensor:
    """O×I → O×G×N; a ragged last group is filled with zeros, which no range or error notices."""
    outputs, inputs = weight_OI.shape
    length = grid.length(inputs)
    missing = grid.groups(inputs) * length - inputs
    return functional.pad(weight_OI, (0, missing)).view(outputs, -1, length)


def _seen_by_groups(gram_II: Tensor, grid: Grid) -> Tensor:
    """The part of the Gram matrix that each group sees alone: G×N×N; of wide groups the diagonal, G×1×N."""
    inputs = len(gram_II)
    groups, length = grid.groups(inputs), grid.length(inputs)
    missing = groups * length - inputs
    if length > _WIDE:
        return functional.pad(gram_II.diagonal(), (0, missing)).view(groups, 1, length)
    padded = functional.pad(gram_II, (0, missing, 0, missing)).view(groups, length, groups, length)
    return torch.stack([padded[group, :, group] for group in range(groups)])


def _steps(grid: Grid) -> tuple[tuple[float, ...], ...]:
    """What a search adds to the factor of a range: first to 1, then to the best found."""
    if grid.scales == POWER_OF_TWO:
        return ((1.0, -0.5),)
    # values of a float lie wide apart at its end: the largest weight may be better off on a smaller one, 4 instead of 6
    return (_COARSE if grid.number is None else (0.5, *_COARSE), _FINE)


_COARSE = (-0.15, -0.3, -0.45)
_FINE = (-0.05, 0.05)
_WIDE = 256
_NARROWEST, _WIDEST = 0.5, 2.0


def _from_range(
    bottom_OG: Tensor, top_OG: Tensor, grid: Grid, scale_dtype: torch.dtype, shared: Tensor | None
) -> Fitted:
    if grid.number is not None:
        scale_OG = _float_scale(torch.maximum(top_OG, -bottom_OG), grid, grid.number, scale_dtype, shared)
        return Fitted(grid, scale_OG, torch.zeros_like(scale_OG), shared)
    if grid.symmetric:
        # the extreme weight lands on the outermost code of its own sign: with the usual (2^b - 1) / 2 steps it would
        # lie half-way between a code and one that does not exist
        span_OG = torch.maximum(bottom_OG / grid.low, top_OG / grid.high)
    else:
        span_OG = (top_OG - bottom_OG) / (grid.high - grid.low)
    scale_OG = span_OG.to(scale_dtype).to(span_OG.dtype)
    scale_OG = torch.where(scale_OG > 0, scale_OG, torch.ones_like(scale_OG))
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


def _error(grouped_OGN: Tensor, fitted: Fitted, gram_GNN: Tensor | None) -> Tensor:
    number = fitted.grid.number
    if number is not None:
        scale = fitted.scale_OG[..., None]
        difference_OGN = number.nearest(grouped_OGN / scale).mul_(scale).sub_(grouped_OGN)
    else:
        scale, zero = fitted.scale_OG[..., None], fitted.zero_OG[..., None]
        codes = (grouped_OGN / scale + zero).round_().clamp_(fitted.grid.low, fitted.grid.high)
        difference_OGN = codes.sub_(zero).mul_(scale).sub_(grouped_OGN)
    if gram_GNN is None:
        return _per_scale(difference_OGN.square_().sum(-1), fitted.grid)
    if gram_GNN.shape[1] == 1:
        return _per_scale(difference_OGN.square_().mul_(gram_GNN[:, 0]).sum(-1), fitted.grid)
    seen_GON = torch.bmm(difference_OGN.transpose(0, 1), gram_GNN)
    return _per_scale(seen_GON.transpose(0, 1).mul(difference_OGN).sum(-1), fitted.grid)


def _per_scale(error_OG: Tensor, grid: Grid) -> Tensor:
    return error_OG.sum(0, keepdim=True) if grid.scales.single else error_OG
