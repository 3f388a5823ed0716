"""Treat the columns of a weight one by one, each error repaired by the columns still to come.

GPTQ and SparseGPT share this sweep; they differ only in what happens to a column. O = outputs, I = inputs,
B = columns of one lazy block. Float32 or float64, as the inputs are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmcompress.numerics.grid import Grid, RangeSearch, fit

MOST_DAMPING = 10.0
"""Above ten times the mean diagonal the Gram matrix no longer says anything: round to nearest instead."""


@dataclass(frozen=True)
class InverseFactor:
    """`upper_II` with `upperᵀ upper = (G + damping · mean(diag G))⁻¹`, and the damping it took."""

    upper_II: Tensor
    damping: float


def inverse_factor(gram_II: Tensor, damping: float) -> InverseFactor | None:
    """Upper Cholesky factor of the damped inverse; damping rises tenfold until it exists, None if it never does.

    Inputs that never were non-zero get a unit diagonal: their weights are rounded to nearest and repair nothing.
    One factorisation instead of the usual three steps (factor, invert, factor): the reversed matrix is factored,
    so that G = R Rᵀ with R upper triangular, and the wanted factor is R⁻¹.
    """
    diagonal_I = gram_II.diagonal()
    dead_I = diagonal_I == 0
    mean = float(diagonal_I[~dead_I].mean()) if not bool(dead_I.all()) else 0.0
    if not math.isfinite(mean) or mean == 0.0:
        return None
    while damping <= MOST_DAMPING:
        damped_II = gram_II.clone()
        damped_II.diagonal().add_(damping * mean).masked_fill_(dead_I, 1.0)
        lower_II, failed = torch.linalg.cholesky_ex(damped_II.flip(0, 1))
        if not failed:
            identity_II = torch.eye(len(gram_II), dtype=gram_II.dtype, device=gram_II.device)
            upper_II = torch.linalg.solve_triangular(lower_II.flip(0, 1), identity_II, upper=True)
            if bool(torch.isfinite(upper_II).all()):
                return InverseFactor(upper_II, damping)
        damping *= 10
    return None


class ColumnTreatment(Protocol):
    """What becomes of one column."""

    def begin(self, column: int, ahead_BO: Tensor) -> None:
        """Called before each column; `ahead_BO` are this and the following columns of the lazy block, corrected."""

    def __call__(self, column: int, weight_O: Tensor) -> Tensor:
        """The new values of the column."""


def sweep_columns(weight_OI: Tensor, upper_II: Tensor, treat: ColumnTreatment, *, block: int = 128) -> Tensor:
    """Treat columns from first to last; subtract each error, spread by the inverse factor, from the later columns.

    Source: Frantar et al., arXiv 2210.17323, Algorithm 1; arXiv 2301.00774, Algorithm 1.
    """
    # transposed, because a column of a row-major matrix is strided and this is all about columns
    weight_IO = weight_OI.T.clone(memory_format=torch.contiguous_format)
    inputs = len(weight_IO)
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        block_BO = weight_IO[start:stop]
        upper_BB = upper_II[start:stop, start:stop]
        errors_BO = torch.empty_like(block_BO)
        for j in range(stop - start):
            treat.begin(start + j, block_BO[j:])
            new_O = treat(start + j, block_BO[j])
            errors_BO[j] = (block_BO[j] - new_O) / upper_BB[j, j]
            block_BO[j] = new_O
            block_BO[j + 1 :].addr_(upper_BB[j, j + 1 :], errors_BO[j], alpha=-1)
        weight_IO[stop:].addmm_(upper_II[start:stop, stop:].T, errors_BO, alpha=-1)
    return weight_IO.T.contiguous()


class RoundToGrid:
    """Rounds columns to an integer grid and keeps the codes.

    A group's scales are fitted when its first column is reached, from weights already corrected; with `order`
    (columns visited by importance) all groups are fitted beforehand, so that no index is needed at inference.
    Per-channel grids are always fitted beforehand. A lazy block must hold whole groups or lie inside one: see
    `block_length`.
    """

    def __init__(
        self,
        weight_OI: Tensor,
        grid: Grid,
        *,
        scale_dtype: torch.dtype,
        search: RangeSearch,
        gram_II: Tensor,
        order_I: Tensor | None = None,
    ) -> None:
        inputs = weight_OI.shape[1]
        self.fitted = fit(weight_OI, grid, scale_dtype=scale_dtype, search=search, gram_II=gram_II)
        self.codes_IO = torch.zeros(inputs, len(weight_OI), dtype=torch.int8, device=weight_OI.device)
        self._order = list(range(inputs)) if order_I is None else order_I.tolist()
        self._refit = grid.group is not None and order_I is None
        self._grid, self._scale_dtype, self._search, self._gram_II = grid, scale_dtype, search, gram_II

    def begin(self, column: int, ahead_BO: Tensor) -> None:
        """At a group's first column: fit its scales again, now that earlier errors have been repaired."""
        length = self._grid.group
        if not self._refit or length is None or column % length:
            return
        group = column // length
        weight_ON = ahead_BO[:length].T
        stop = column + weight_ON.shape[1]
        again = fit(
            weight_ON,
            Grid(self._grid.bits, self._grid.symmetric, None),
            scale_dtype=self._scale_dtype,
            search=self._search,
            gram_II=self._gram_II[column:stop, column:stop],
        )
        self.fitted.scale_OG[:, group] = again.scale_OG[:, 0]
        self.fitted.zero_OG[:, group] = again.zero_OG[:, 0]

    def __call__(self, column: int, weight_O: Tensor) -> Tensor:
        """Nearest grid values of one column."""
        true = self._order[column]
        group = 0 if self._grid.group is None else true // self._grid.group
        scale_O, zero_O = self.fitted.scale_OG[:, group], self.fitted.zero_OG[:, group]
        codes_O = (weight_O / scale_O + zero_O).round_().clamp_(self._grid.low, self._grid.high)
        self.codes_IO[true] = codes_O.to(torch.int8)
        return (codes_O - zero_O) * scale_O


def block_length(group: int | None, wanted: int) -> int:
    """A lazy block near `wanted` columns that never splits a group whose scales are still to be fitted."""
    if group is None:
        return wanted
    return group * max(1, wanted // group)
