"""Refits scales with fixed codes. O = outputs, I = inputs, G = groups of inputs, C = rows of a chunk."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from llmcompress.numerics.formats import STORED
from llmcompress.numerics.grid import Fitted, restore, row_errors

_MOST_NUMBERS = 1 << 24
"""Of the rows that are solved together: one G×G system each."""


def refine_scales(
    weight_OI: Tensor,
    codes_OI: Tensor,
    fitted: Fitted,
    gram_II: Tensor,
    *,
    scale_dtype: torch.dtype = torch.float32,
    sweeps: int = 4,
) -> Fitted:
    """The scales, one per row and group, with which these codes come nearest to the weights' outputs.

    Every row is a least-squares problem in its scales. Its solution is rounded to what will be stored; then one scale
    after the other moves to the best value that can be stored, given the others. A row whose error does not fall
    keeps its scales, so no row gets worse. No scale changes its sign.
    """
    assert fitted.grid.scales == STORED and not fitted.grid.scales.single, "scales of one dtype, one per row and group"
    ones = replace(fitted, scale_OG=torch.ones_like(fitted.scale_OG))
    unit_OI = restore(codes_OI, ones)
    groups = fitted.scale_OG.shape[1]
    rows = max(1, _MOST_NUMBERS // (groups * groups))
    length = fitted.grid.length(weight_OI.shape[1])
    parts = [
        _refine_rows(*part, gram_II, length, scale_dtype, sweeps)
        for part in zip(
            torch.split(unit_OI, rows), torch.split(weight_OI, rows), torch.split(fitted.scale_OG, rows), strict=True
        )
    ]
    refined = replace(fitted, scale_OG=torch.cat(parts))
    before_O, after_O = (row_errors(restore(codes_OI, each) - weight_OI, gram_II) for each in (fitted, refined))
    return replace(fitted, scale_OG=torch.where((after_O < before_O)[:, None], refined.scale_OG, fitted.scale_OG))


def _refine_rows(
    unit_CI: Tensor,
    weight_CI: Tensor,
    scale_CG: Tensor,
    gram_II: Tensor,
    length: int,
    scale_dtype: torch.dtype,
    sweeps: int,
) -> Tensor:
    square_CGG, aim_CG = _systems(unit_CI, weight_CI, gram_II, length)

    def stored(values: Tensor) -> Tensor:
        return values.to(scale_dtype).double()

    def error_C(scales_CG: Tensor) -> Tensor:
        return torch.einsum("cg,cgh,ch->c", scales_CG, square_CGG, scales_CG) - 2 * (scales_CG * aim_CG).sum(1)

    now_CG = scale_CG.double()
    diagonal_CG = square_CGG.diagonal(dim1=1, dim2=2)
    damped_CGG = square_CGG + torch.diag_embed(1e-6 * diagonal_CG + (diagonal_CG <= 0).double())
    solved_CG = stored(torch.linalg.solve(damped_CGG, aim_CG))
    solved_CG = torch.where((diagonal_CG > 0) & (solved_CG * now_CG > 0), solved_CG, now_CG)
    now_CG = torch.where((error_C(solved_CG) < error_C(now_CG))[:, None], solved_CG, now_CG)
    rest_CG = aim_CG - torch.einsum("cgh,ch->cg", square_CGG, now_CG)
    for _ in range(sweeps):
        for group in range(now_CG.shape[1]):
            diagonal_C, rest_C = diagonal_CG[:, group], rest_CG[:, group]
            trial_C = stored(now_CG[:, group] + rest_C / diagonal_C.clamp_min(1e-300))
            step_C = trial_C - now_CG[:, group]
            better_C = (
                (diagonal_C > 0)
                & (trial_C * now_CG[:, group] > 0)
                & (diagonal_C * step_C.square() < 2 * rest_C * step_C)
            )
            step_C = torch.where(better_C, step_C, torch.zeros_like(step_C))
            now_CG[:, group] += step_C
            rest_CG -= square_CGG[:, :, group] * step_C[:, None]
    return now_CG.to(scale_CG.dtype)


def _systems(unit_CI: Tensor, weight_CI: Tensor, gram_II: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Of every row the matrix and the right side: products of what each group adds to the output, C×G×G and C×G."""
    rows, inputs = unit_CI.shape
    groups = -(-inputs // length)
    missing = groups * length - inputs
    square_CGG = torch.zeros(rows, groups, groups, dtype=torch.float64, device=unit_CI.device)
    aim_CG = torch.zeros(rows, groups, dtype=torch.float64, device=unit_CI.device)
    for group in range(groups):
        columns = slice(group * length, min((group + 1) * length, inputs))
        seen_CI = unit_CI[:, columns] @ gram_II[columns]
        products_CI = functional.pad(seen_CI * unit_CI, (0, missing))
        square_CGG[:, group] = products_CI.view(rows, groups, length).sum(-1, dtype=torch.float64)
        aim_CG[:, group] = (seen_CI * weight_CI).sum(-1, dtype=torch.float64)
    return square_CGG, aim_CG
