"""Integer grids: fit scales, round, restore. O = outputs, I = inputs, G = groups of inputs, N = group length.

Codes are signed in both modes, `-2^(b-1) … 2^(b-1)-1`, as compressed-tensors stores them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

RangeSearch = Literal["minmax", "mse"]
"""Cover a group's whole range, or the shrunken range whose rounding error is least."""


@dataclass(frozen=True)
class Grid:
    """Which integers a weight may become, and how many inputs share a scale (`group=None`: the whole row)."""

    bits: int
    symmetric: bool = True
    group: int | None = None

    @property
    def low(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, inputs: int) -> int:
        """Number of scales a row of `inputs` weights has; a ragged last group counts."""
        return 1 if self.group is None else -(-inputs // self.group)

    def length(self, inputs: int) -> int:
        """Weights under one scale."""
        return inputs if self.group is None else self.group


@dataclass(frozen=True)
class Fitted:
    """A grid with its numbers: `scale_OG` holds values of the stored type, `zero_OG` integers, as floats both."""

    grid: Grid
    scale_OG: Tensor
    zero_OG: Tensor


def fit(
    weight_OI: Tensor,
    grid: Grid,
    *,
    scale_dtype: torch.dtype = torch.float32,
    search: RangeSearch = "minmax",
    gram_II: Tensor | None = None,
) -> Fitted:
    """Scales and zero points of every group, for weights in float32.

    Scales are rounded to `scale_dtype` before anything is rounded with them, so what is computed here is what a
    loader of the saved model computes. A group of zeros gets scale 1. With `search="mse"` the range shrinks in
    twenty steps down to half; the error is that of the group's part of the output when `gram_II` is given
    (AWQ's clipping), plain squared error otherwise. The full range is one of the candidates.

    Source: Jacob et al., arXiv 1712.05877, section 2 (range includes 0, zero is exact);
    Lin et al., arXiv 2306.00978 (clipping per row and group).
    """
    grouped_OGN = _grouped(weight_OI, grid)
    top_OG = grouped_OGN.amax(-1).clamp_min(0)
    bottom_OG = grouped_OGN.amin(-1).clamp_max(0)
    best = _from_range(bottom_OG, top_OG, grid, scale_dtype)
    if search == "minmax":
        return best
    gram_GNN = None if gram_II is None else _diagonal_blocks(gram_II, grid)
    best_error_OG = _error(grouped_OGN, best, gram_GNN)
    for step in range(1, 20):
        shrink = 1 - step / 40
        trial = _from_range(bottom_OG * shrink, top_OG * shrink, grid, scale_dtype)
        error_OG = _error(grouped_OGN, trial, gram_GNN)
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


def _diagonal_blocks(gram_II: Tensor, grid: Grid) -> Tensor:
    """The part of the Gram matrix that each group sees alone: G×N×N."""
    inputs = len(gram_II)
    groups, length = grid.groups(inputs), grid.length(inputs)
    missing = groups * length - inputs
    padded = functional.pad(gram_II, (0, missing, 0, missing)).view(groups, length, groups, length)
    return torch.stack([padded[group, :, group] for group in range(groups)])


def _from_range(bottom_OG: Tensor, top_OG: Tensor, grid: Grid, scale_dtype: torch.dtype) -> Fitted:
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


def _error(grouped_OGN: Tensor, fitted: Fitted, gram_GNN: Tensor | None) -> Tensor:
    scale, zero = fitted.scale_OG[..., None], fitted.zero_OG[..., None]
    codes = (grouped_OGN / scale + zero).round_().clamp_(fitted.grid.low, fitted.grid.high)
    difference_OGN = codes.sub_(zero).mul_(scale).sub_(grouped_OGN)
    if gram_GNN is None:
        return difference_OGN.square_().sum(-1)
    seen_GON = torch.bmm(difference_OGN.transpose(0, 1), gram_GNN)
    return seen_GON.transpose(0, 1).mul(difference_OGN).sum(-1)
