"""The error of rounding every group of a matrix, alone or as part of the output; searches of ranges compare it.

O = outputs, I = inputs, G = groups of inputs, N = group length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from llmcompress.numerics.grid import Fitted, Grid

_WIDE = 256
_CACHED = 1 << 17
"""Weights whose errors are found at a time: all that is made of them on the way stays in the cache."""


def rounding_error(grouped_OGN: Tensor, fitted: Fitted, gram_GNN: Tensor | None) -> Tensor:
    """Squared error of every group's rounding; where `gram_GNN` is given, of its part of the output."""
    error_OG = torch.empty_like(grouped_OGN[..., 0])
    rows = max(1, _CACHED // max(1, grouped_OGN[0].numel()))
    for start in range(0, len(grouped_OGN), rows):
        piece = slice(start, start + rows)
        difference_OGN = _difference(grouped_OGN[piece], fitted.rows(piece))
        if gram_GNN is None:
            seen_OGN = difference_OGN.square()
        elif gram_GNN.shape[1] == 1:
            seen_OGN = difference_OGN.square().mul_(gram_GNN[:, 0])
        else:
            seen_OGN = torch.bmm(difference_OGN.transpose(0, 1), gram_GNN).transpose(0, 1).mul_(difference_OGN)
        torch.sum(seen_OGN, -1, out=error_OG[piece])
    return per_scale(error_OG, fitted.grid)


def seen_by_groups(gram_II: Tensor, grid: Grid) -> Tensor:
    """The part of the Gram matrix that each group sees alone: G×N×N; of wide groups the diagonal, G×1×N."""
    inputs = len(gram_II)
    groups, length = grid.groups(inputs), grid.length(inputs)
    missing = groups * length - inputs
    if length > _WIDE:
        return functional.pad(gram_II.diagonal(), (0, missing)).view(groups, 1, length)
    seen_GNN = gram_II.new_zeros(groups, length, length)
    for group, start in enumerate(range(0, inputs, length)):
        part_NN = gram_II[start : start + length, start : start + length]
        seen_GNN[group, : len(part_NN), : len(part_NN)] = part_NN
    return seen_GNN


def per_scale(error_OG: Tensor, grid: Grid) -> Tensor:
    """The sum over all rows, where they share their scales."""
    return error_OG.sum(0, keepdim=True) if grid.scales.single else error_OG


def _difference(grouped_OGN: Tensor, fitted: Fitted) -> Tensor:
    """What rounding adds to the weights."""
    grid, scale_OG1, zero_OG1 = fitted.grid, fitted.scale_OG[..., None], fitted.zero_OG[..., None]
    scaled_OGN = grouped_OGN / scale_OG1
    if grid.number is not None:
        return grid.number.nearest(scaled_OGN).mul_(scale_OG1).sub_(grouped_OGN)
    if grid.symmetric:
        return scaled_OGN.round_().clamp_(grid.low, grid.high).mul_(scale_OG1).sub_(grouped_OGN)
    codes_OGN = scaled_OGN.add_(zero_OG1).round_().clamp_(grid.low, grid.high)
    return codes_OGN.sub_(zero_OG1).mul_(scale_OG1).sub_(grouped_OGN)
