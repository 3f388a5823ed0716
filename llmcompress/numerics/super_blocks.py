"""Scales in two levels for K-quants: small integers per group, times one or two float16 numbers per super-block.

O = outputs, I = inputs, G = groups of inputs (of all super-blocks, the last one filled up), S = super-blocks of a row,
N = group length, L = numbers that a super-block shares: its scale and, where groups have minima, theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from llmcompress.numerics.grid import Fitted, Grid, grouped, of_groups, row_pieces
from llmcompress.numerics.rounding_error import rounding_error

_ROUNDS = 2
"""Of neighbouring integers and least squares for what super-blocks share; a third changes the error by 1e-4 of it."""
_LINES = 2
"""Further rounds of codes and least squares for a group's own scale and minimum."""
_BEGINNINGS = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
"""Steps more than there are that the range of a group is divided into, at first. Source: the `rmin` of ggml's search,
with wider spaces, as every one is solved for."""
_LEAST = 2.0**-24
"""The smallest float16: a scale of 0 would lose the sign of its group."""


def with_super_blocks(
    weight_OI: Tensor, free: Fitted, grid: Grid, *, gram_GNN: Tensor | None = None, refine: bool = True
) -> Fitted:
    """The scales and zero points of `free`, a fit on the same grid with scales of any value, as super-blocks hold them.

    With `refine` they are only where it begins: minima become real numbers by least squares, the integers of groups and
    what super-blocks share are improved in turns, and the error (of the output, where `gram_GNN` is given) never rises.

    Source: `make_qkx3_quants` and `make_qx_quants` in ggml-quants.c of ggml (a least-squares line per group, quantized
    largest first). Differs: errors are those of the output; after the quantization of scales their integers are
    searched and the shared numbers solved for again.
    """
    pieces = row_pieces(weight_OI)
    found = [_of_rows(weight_OI[rows], free.rows(rows), grid, gram_GNN, refine=refine) for rows in pieces]
    if len(found) == 1:
        return found[0]
    scales, zeros = [each.scale_OG for each in found], [each.zero_OG for each in found]
    shared = [each.shared for each in found if each.shared is not None]
    return Fitted(grid, torch.cat(scales), torch.cat(zeros), torch.cat(shared))


def per_super_block(value_OG: Tensor, grid: Grid) -> Tensor:
    """Sums over the groups of every super-block, O×S."""
    assert grid.scales.super_block is not None and grid.group is not None
    each = grid.scales.super_block // grid.group
    padded_OG = functional.pad(value_OG, (0, -value_OG.shape[1] % each))
    return padded_OG.reshape(len(value_OG), -1, each).sum(-1)


def chosen_super_blocks(first: Fitted, second: Fitted, better_OS: Tensor) -> Fitted:
    """The first fit where `better_OS` (or O×1), the second elsewhere."""
    assert first.shared is not None and second.shared is not None
    better_OS = better_OS.expand(first.shared.shape[:2])
    better_OG = of_groups(better_OS, first.grid, first.scale_OG.shape[1])
    return replace(
        second,
        scale_OG=torch.where(better_OG, first.scale_OG, second.scale_OG),
        zero_OG=torch.where(better_OG, first.zero_OG, second.zero_OG),
        shared=torch.where(better_OS[..., None], first.shared, second.shared),
    )


def _of_rows(weight_OI: Tensor, free: Fitted, grid: Grid, gram_GNN: Tensor | None, *, refine: bool) -> Fitted:
    assert grid.scales.super_block is not None
    inputs, groups = weight_OI.shape[1], free.scale_OG.shape[1]
    weight_OGN = grouped(functional.pad(weight_OI, (0, -inputs % grid.scales.super_block)), grid)
    missing = weight_OGN.shape[1] - groups
    if gram_GNN is not None:
        gram_GNN = functional.pad(gram_GNN, (0, 0, 0, 0, 0, missing))
    there_OG = weight_OGN.abs().amax(-1) > 0  # a free scale of 1 stands for a group of zeros
    scale_OG = functional.pad(free.scale_OG.float(), (0, missing)) * there_OG
    minimum_OG = (functional.pad(free.zero_OG.float(), (0, missing)) - grid.low) * scale_OG
    search = _Search(weight_OGN, grid, gram_GNN)
    if refine and grid.scales.minima:
        scale_OG, minimum_OG = search.lines(scale_OG, minimum_OG)
    outermost = grid.scales.integers[1 if grid.scales.minima else 0]
    best = _largest_first(scale_OG, minimum_OG, grid, outermost)
    if refine:
        for step in (-1, 1, 2, 3):
            best = search.better(_largest_first(scale_OG, minimum_OG, grid, outermost + step), best)
        for _ in range(_ROUNDS):
            best = search.with_neighbours(best)
            best = search.better(search.with_shared_solved(best), best)
    found = best.fitted(grid)
    return replace(found, scale_OG=found.scale_OG[:, :groups].clone(), zero_OG=found.zero_OG[:, :groups].clone())


@dataclass(frozen=True)
class _Levels:
    """Both levels of scales, as they are stored."""

    integer_OG: Tensor
    minimum_OG: Tensor | None
    shared_OSL: Tensor

    def fitted(self, grid: Grid) -> Fitted:
        return Fitted.of_stored(grid, self.integer_OG, self.minimum_OG, self.shared_OSL)


def _largest_first(scale_OG: Tensor, minimum_OG: Tensor, grid: Grid, outermost: int) -> _Levels:
    """The largest scale (and minimum) of a super-block becomes that integer, the others the nearest."""
    assert grid.scales.super_block is not None and grid.group is not None
    shape = (len(scale_OG), -1, grid.scales.super_block // grid.group)
    scale_OSK = scale_OG.reshape(shape)
    largest_OS1 = scale_OSK.gather(-1, scale_OSK.abs().argmax(-1, keepdim=True))
    if not grid.scales.minima:
        shared_OS1 = _float16(largest_OS1 / outermost)
        return _Levels(_nearest(scale_OG, shared_OS1[..., 0], grid), None, shared_OS1)
    largest_OS2 = torch.cat([largest_OS1, minimum_OG.reshape(shape).amax(-1, keepdim=True)], -1)
    shared_OS2 = _float16(largest_OS2 / outermost)
    steps_OG = of_groups(shared_OS2[..., 1], grid, minimum_OG.shape[1])
    integer_OG = (minimum_OG / steps_OG).round().clamp(0, grid.scales.integers[1])
    return _Levels(_nearest(scale_OG, shared_OS2[..., 0], grid), integer_OG, shared_OS2)


def _nearest(scale_OG: Tensor, shared_OS: Tensor, grid: Grid) -> Tensor:
    """Integers that are no 0: with the next one the same weights can be said."""
    exact_OG = scale_OG / of_groups(shared_OS, grid, scale_OG.shape[1])
    return _without_zero(exact_OG.round(), exact_OG, grid)


def _without_zero(integer_OG: Tensor, like_OG: Tensor, grid: Grid) -> Tensor:
    one_OG = torch.where(like_OG < 0, -1.0, 1.0) if grid.scales.integers[0] < 0 else torch.ones_like(like_OG)
    return torch.where(integer_OG == 0, one_OG, integer_OG).clamp(*grid.scales.integers)


def _float16(value: Tensor) -> Tensor:
    """The nearest float16 that is not 0; of 0 itself 1."""
    near = value.clamp(-65504, 65504).half().float()
    least = torch.where(value < 0, -_LEAST, torch.where(value > 0, _LEAST, 1.0))
    return torch.where(near == 0, least, near)


@dataclass(frozen=True)
class _Search:
    """Weights, and what errors in them cost."""

    weight_OGN: Tensor
    grid: Grid
    gram_GNN: Tensor | None

    def better(self, trial: _Levels, best: _Levels) -> _Levels:
        """For every super-block the one with the lesser error."""
        error_OG, least_OG = self._error(trial), self._error(best)
        better_OS = per_super_block(error_OG, self.grid) < per_super_block(least_OG, self.grid)
        better_OG = of_groups(better_OS, self.grid, error_OG.shape[1])
        return _either(better_OG, better_OS[..., None], trial, best)

    def with_neighbours(self, best: _Levels) -> _Levels:
        """The best of every group's integers and those next to them."""
        low, high = self.grid.scales.integers
        first, least_OG = best, self._error(best)
        for by, minimum_by in product((-1, 0, 1), (-1, 0, 1) if self.grid.scales.minima else (0,)):
            if not by and not minimum_by:
                continue
            integer_OG = (first.integer_OG + by).clamp(low, high)
            minimum_OG = None if first.minimum_OG is None else (first.minimum_OG + minimum_by).clamp(0, high)
            trial = _Levels(_without_zero(integer_OG, first.integer_OG, self.grid), minimum_OG, first.shared_OSL)
            error_OG = self._error(trial)
            best = _either(error_OG < least_OG, None, trial, best)
            least_OG = torch.minimum(error_OG, least_OG)
        return best

    def with_shared_solved(self, now: _Levels) -> _Levels:
        """Codes and integers stay: what super-blocks share is solved for by least squares, and rounded."""
        steps_OGN = self._steps(now.fitted(self.grid))
        seen_OGN = self._seen(steps_OGN)
        by_OG = now.integer_OG
        square_OS = self._sum(by_OG.square() * (steps_OGN * seen_OGN).sum(-1))
        wanted_OS = self._sum(by_OG * (self.weight_OGN * seen_OGN).sum(-1))
        if now.minimum_OG is None:
            return replace(now, shared_OSL=_float16(torch.where(square_OS > 0, wanted_OS / square_OS, 1.0))[..., None])
        ones_OGN = self._seen(torch.ones_like(steps_OGN))
        minimum_OG = now.minimum_OG
        both_OS = self._sum(by_OG * minimum_OG * (steps_OGN * ones_OGN).sum(-1))
        minimum_square_OS = self._sum(minimum_OG.square() * ones_OGN.sum(-1))
        minimum_wanted_OS = self._sum(minimum_OG * (self.weight_OGN * ones_OGN).sum(-1))
        scale_OS, minimum_OS = _line(square_OS, both_OS, minimum_square_OS, wanted_OS, minimum_wanted_OS)
        found_OS2 = torch.stack([scale_OS, minimum_OS], -1)
        return replace(now, shared_OSL=torch.where(found_OS2 > 0, _float16(found_OS2), now.shared_OSL))

    def lines(self, scale_OG: Tensor, minimum_OG: Tensor) -> tuple[Tensor, Tensor]:
        """For every group the least-squares line through its weights and their codes, the best of several beginnings,
        and again with the codes of that line.
        """
        bottom_OG, top_OG = self.weight_OGN.amin(-1).clamp_max(0), self.weight_OGN.amax(-1).clamp_min(0)
        levels = self.grid.high - self.grid.low
        best_OG2 = torch.stack([scale_OG, minimum_OG], -1)
        least_OG = self._line_error(best_OG2)
        ones_OGN = self._seen(torch.ones_like(self.weight_OGN))
        begun = [torch.stack([(top_OG - bottom_OG) / (levels + step), -bottom_OG], -1) for step in _BEGINNINGS]
        for now_OG2 in (best_OG2, *begun, *[None] * _LINES):
            tried_OG2 = self._solved(best_OG2 if now_OG2 is None else now_OG2, ones_OGN)
            error_OG = self._line_error(tried_OG2)
            best_OG2 = torch.where((error_OG < least_OG)[..., None], tried_OG2, best_OG2)
            least_OG = torch.minimum(error_OG, least_OG)
        return best_OG2[..., 0], best_OG2[..., 1]

    def _solved(self, line_OG2: Tensor, ones_OGN: Tensor) -> Tensor:
        """Scale and minimum by least squares, for the codes that these give."""
        steps_OGN = self._line(line_OG2)[0]
        seen_OGN = self._seen(steps_OGN)
        square_OG, wanted_OG = (steps_OGN * seen_OGN).sum(-1), (self.weight_OGN * seen_OGN).sum(-1)
        one_OG, weight_OG = ones_OGN.sum(-1), (self.weight_OGN * ones_OGN).sum(-1)
        slope_OG, below_OG = _line(square_OG, (steps_OGN * ones_OGN).sum(-1), one_OG, wanted_OG, weight_OG)
        # a minimum below zero cannot be said: the line through zero then
        slope_OG = torch.where(below_OG < 0, wanted_OG / square_OG, slope_OG)
        solved_OG2 = torch.stack([slope_OG, below_OG.clamp_min(0)], -1)
        return torch.where((slope_OG > 0)[..., None], solved_OG2, line_OG2)

    def _line(self, line_OG2: Tensor) -> tuple[Tensor, Tensor]:
        """Steps above the lowest code of the nearest codes, and what is restored from them."""
        scale_OG1, minimum_OG1 = torch.where(line_OG2 > 0, line_OG2, 1.0)[..., :1], line_OG2[..., 1:]
        levels = self.grid.high - self.grid.low
        steps_OGN = ((self.weight_OGN + minimum_OG1) / scale_OG1).round_().clamp_(0, levels)
        return steps_OGN, steps_OGN * scale_OG1 - minimum_OG1

    def _line_error(self, line_OG2: Tensor) -> Tensor:
        difference_OGN = self._line(line_OG2)[1] - self.weight_OGN
        return (self._seen(difference_OGN) * difference_OGN).sum(-1)

    def _steps(self, fitted: Fitted) -> Tensor:
        """Nearest codes, from the code that is a weight of zero, or of minus the minimum."""
        grid, zero_OG1 = self.grid, fitted.zero_OG[..., None]
        codes_OGN = (self.weight_OGN / fitted.scale_OG[..., None] + zero_OG1).round_().clamp_(grid.low, grid.high)
        return codes_OGN - grid.low if grid.scales.minima else codes_OGN

    def _error(self, levels: _Levels) -> Tensor:
        return rounding_error(self.weight_OGN, levels.fitted(self.grid), self.gram_GNN)

    def _seen(self, values_OGN: Tensor) -> Tensor:
        """Times the Gram matrix of every group."""
        if self.gram_GNN is None:
            return values_OGN
        return torch.bmm(values_OGN.transpose(0, 1), self.gram_GNN).transpose(0, 1)

    def _sum(self, value_OG: Tensor) -> Tensor:
        return per_super_block(value_OG, self.grid)


def _line(square: Tensor, both: Tensor, one: Tensor, wanted: Tensor, one_wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum with the least squares: of steps x and ones, their products with each other and the weights."""
    across = torch.where(one > 0, both / one, 0.0)
    scale = (wanted - across * one_wanted) / (square - across * both)
    return scale, torch.where(one > 0, (scale * both - one_wanted) / one, 0.0)


def _either(better_OG: Tensor, better_OS1: Tensor | None, first: _Levels, second: _Levels) -> _Levels:
    """The first where true; what is shared is the second's where nothing is said of it."""
    minimum_OG = None
    if first.minimum_OG is not None and second.minimum_OG is not None:
        minimum_OG = torch.where(better_OG, first.minimum_OG, second.minimum_OG)
    shared_OSL = second.shared_OSL
    if better_OS1 is not None:
        shared_OSL = torch.where(better_OS1, first.shared_OSL, shared_OSL)
    return _Levels(torch.where(better_OG, first.integer_OG, second.integer_OG), minimum_OG, shared_OSL)
