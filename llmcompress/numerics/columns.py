"""The column sweep: treats the columns of a weight one by one and compensates each error in the remaining columns.

GPTQ and SparseGPT share this sweep; they differ only in what they do to a column. O = outputs, I = inputs, B = columns
of one lazy block. Float32 or float64, as the inputs are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from llmcompress.numerics.grid import Grid
from llmcompress.numerics.masks import Pattern, count_of_zeros, lowest, lowest_of
from llmcompress.numerics.ranges import RangeSearch, fit

MOST_DAMPING = 10.0
"""Above ten times the mean diagonal the Gram matrix no longer says anything: round to nearest instead."""

SMALL = 128
"""Triangular matrices up to this size are inverted in one step."""


@dataclass(frozen=True)
class InverseFactor:
    """`upper_II` with `upperᵀ upper = (G + damping · mean(diag G))⁻¹`, and the damping it took."""

    upper_II: Tensor
    damping: float
    ridge: float
    """What was added to the diagonal."""


def inverse_factor(gram_II: Tensor, damping: float, order_I: Tensor | None = None) -> InverseFactor | None:
    """Upper Cholesky factor of the damped inverse; damping rises tenfold until it exists, None if it never does.

    With `order_I` it is that of the matrix whose rows and columns are taken in this order.

    Inputs that never were non-zero have the damping alone: their weights repair nothing and are dropped first.
    One factorisation instead of the usual three steps (factor, invert, factor): the reversed matrix is factored,
    so that G = R Rᵀ with R upper triangular, and the wanted factor is R⁻¹.
    """
    diagonal_I = gram_II.diagonal()
    dead_I = diagonal_I == 0
    mean = float(diagonal_I[~dead_I].mean()) if not bool(dead_I.all()) else 0.0
    if not math.isfinite(mean) or mean == 0.0:
        return None
    if order_I is None:
        order_I = torch.arange(len(gram_II), device=gram_II.device)
    reverse_I = order_I.flip(0)
    while damping <= MOST_DAMPING:
        # these are the largest matrices: no more than two are alive besides the given one
        damped_II = gram_II[reverse_I[:, None], reverse_I]
        damped_II.diagonal().add_(damping * mean)
        lower_II, failed = torch.linalg.cholesky_ex(damped_II)
        del damped_II
        if not failed:
            upper_II = lower_II.flip(0, 1)
            del lower_II
            invert_upper_(upper_II)
            if bool(torch.isfinite(upper_II.diagonal()).all()) and bool(torch.isfinite(upper_II.sum())):
                return InverseFactor(upper_II, damping, damping * mean)
        damping *= 10
    return None


def invert_upper_(upper_II: Tensor) -> None:
    """Make an upper triangular matrix its inverse, half by half: a third of the work of solving for the identity."""
    inputs = len(upper_II)
    if inputs <= SMALL:
        identity_II = torch.eye(inputs, dtype=upper_II.dtype, device=upper_II.device)
        upper_II.copy_(torch.linalg.solve_triangular(upper_II, identity_II, upper=True))
        return
    half = inputs // 2
    invert_upper_(upper_II[:half, :half])
    invert_upper_(upper_II[half:, half:])
    upper_II[:half, half:] = (upper_II[:half, :half] @ upper_II[:half, half:] @ upper_II[half:, half:]).neg_()


class ColumnTreatment(Protocol):
    """What becomes of one column."""

    @property
    def every(self) -> int:
        """`begin` is called at columns that are multiples of this; 0: never."""

    def begin(self, column: int, ahead_BO: Tensor) -> None:
        """Called before the column; `ahead_BO` are this and the following columns of the lazy block, corrected."""

    def __call__(self, column: int, weight_O: Tensor) -> Tensor:
        """The new values of the column."""


def sweep_columns(weight_OI: Tensor, upper_II: Tensor, treat: ColumnTreatment, *, block: int = 128) -> Tensor:
    """Treat columns from first to last; subtract each error, spread by the inverse factor, from the later columns.

    Source: Frantar et al., arXiv 2210.17323, Algorithm 1; arXiv 2301.00774, Algorithm 1.
    """
    # transposed, because a column of a row-major matrix is strided and this is all about columns
    weight_IO = weight_OI.T.clone(memory_format=torch.contiguous_format)
    sweep_columns_(weight_IO, upper_II, treat, block=block)
    return weight_IO.T.contiguous()


def sweep_columns_(weight_IO: Tensor, upper_II: Tensor, treat: ColumnTreatment, *, block: int = 128) -> Tensor:
    """The same in place, on the transposed weight.

    Returns for every output Σ ΔW (G + ridge) ΔWᵀ: the squares of all columns' errors add up to it.
    """
    inputs = len(weight_IO)
    loss_O = torch.zeros_like(weight_IO[0])
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        block_BO = weight_IO[start:stop]
        errors_BO = torch.empty_like(block_BO)
        upper_BB = upper_II[start:stop, start:stop]
        columns = zip(
            block_BO.unbind(), errors_BO.unbind(), upper_BB.unbind(), upper_BB.diagonal().tolist(), strict=True
        )
        for j, (weight_O, error_O, upper_B, scale) in enumerate(columns):
            if treat.every and (start + j) % treat.every == 0:
                treat.begin(start + j, block_BO[j:])
            new_O = treat(start + j, weight_O)
            torch.sub(weight_O, new_O, out=error_O).div_(scale)
            weight_O.copy_(new_O)
            block_BO[j + 1 :].addr_(upper_B[j + 1 :], error_O, alpha=-1)
        weight_IO[stop:].addmm_(upper_II[start:stop, stop:].T, errors_BO, alpha=-1)
        loss_O += errors_BO.square_().sum(0)
    return loss_O


class RoundToGrid:
    """Rounds columns to a grid and keeps the codes.

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
        self.every = grid.span if grid.span is not None and order_I is None else 0
        self._grid, self._scale_dtype, self._search, self._gram_II = grid, scale_dtype, search, gram_II
        self._span_grid = grid if grid.scales.super_block is not None else replace(grid, group=None)
        # the sweep makes thousands of small steps: scales of a group lie side by side, rows are cut out once
        self._scale_GO = self.fitted.scale_OG.T.expand(-1, len(weight_OI)).contiguous()
        self._zero_GO = self.fitted.zero_OG.T.expand(-1, len(weight_OI)).contiguous()
        self._code_rows = self.codes_IO.unbind()

    def begin(self, column: int, ahead_BO: Tensor) -> None:
        """At the first column of a group or super-block: fit its scales again, as earlier errors were repaired."""
        weight_ON = ahead_BO[: self.every].T
        stop = column + weight_ON.shape[1]
        again = fit(
            weight_ON,
            self._span_grid,
            scale_dtype=self._scale_dtype,
            search=self._search,
            gram_II=self._gram_II[column:stop, column:stop],
            shared=self.fitted.shared,
        )
        first = column // (self._grid.group or self.every)
        groups = slice(first, first + again.scale_OG.shape[1])
        self.fitted.scale_OG[:, groups] = again.scale_OG
        self.fitted.zero_OG[:, groups] = again.zero_OG
        self._scale_GO[groups], self._zero_GO[groups] = again.scale_OG.T, again.zero_OG.T
        if again.shared is not None and self.fitted.shared is not None and self._grid.scales.super_block is not None:
            self.fitted.shared[:, column // self.every] = again.shared[:, 0]

    def __call__(self, column: int, weight_O: Tensor) -> Tensor:
        """Nearest grid values of one column."""
        true = self._order[column]
        group = 0 if self._grid.group is None else true // self._grid.group
        scale_O, number = self._scale_GO[group], self._grid.number
        scaled_O = weight_O / scale_O
        if number is not None:
            floats_O = number.encode(scaled_O)
            self._code_rows[true].copy_(floats_O)
            return number.decode(floats_O, weight_O.dtype) * scale_O
        if self._grid.symmetric:
            self._code_rows[true].copy_(scaled_O.round_().clamp_(self._grid.low, self._grid.high))
            return scaled_O.mul_(scale_O)
        zero_O = self._zero_GO[group]
        self._code_rows[true].copy_(scaled_O.add_(zero_O).round_().clamp_(self._grid.low, self._grid.high))
        return scaled_O.sub_(zero_O).mul_(scale_O)


class DropWeights:
    """Makes some weights zero; the others stay, or become what another treatment makes of the column.

    The error of a dropped weight is its whole corrected value, which the sweep spreads onto the later columns. The
    mask is given, or chosen on the way: see `DropLowest`.
    """

    def __init__(self, zero_IO: Tensor, then: ColumnTreatment | None = None) -> None:
        self.zero_IO, self._then = zero_IO, then
        self._zero_rows = zero_IO.unbind()
        self.every = then.every if then else 0

    def begin(self, column: int, ahead_BO: Tensor) -> None:
        """The other treatment sees zeros where they are known already."""
        if self._then and self._then.every and column % self._then.every == 0:
            known_BO = self.zero_IO[column : column + len(ahead_BO)]
            self._then.begin(column, ahead_BO.masked_fill(known_BO, 0.0))

    def __call__(self, column: int, weight_O: Tensor) -> Tensor:
        """Zeros where weights are dropped; a grid holds zero exactly, so rounding keeps them."""
        kept_O = weight_O.masked_fill(self._zero_rows[column], 0.0)
        return self._then(column, kept_O) if self._then else kept_O


class DropLowest(DropWeights):
    """Chooses what to drop from weights already corrected: the lowest w² ÷ U² of a span of columns.

    `pattern` drops so many of every few columns in each row; otherwise the lowest of `span` columns and all rows
    together are dropped, so rows may differ; lazy blocks must hold whole spans. Weights that are zero already are
    among those dropped.

    Source: Frantar, Alistarh, arXiv 2301.00774, section 3.2. Differs: exactly the share is dropped, without ties.
    """

    def __init__(
        self,
        weight_OI: Tensor,
        upper_II: Tensor,
        *,
        share: float,
        pattern: Pattern | None,
        span: int,
        then: ColumnTreatment | None = None,
    ) -> None:
        super().__init__((weight_OI == 0).T.contiguous(), then)
        self._scale_I1 = upper_II.diagonal()[:, None]
        self._share, self._pattern = share, pattern
        self._span = pattern.of if pattern else span
        self.every = math.gcd(self._span, self.every)

    def begin(self, column: int, ahead_BO: Tensor) -> None:
        """At the first column of a span: choose."""
        if column % self._span == 0:
            here = slice(column, column + min(self._span, len(ahead_BO)))
            now_SO = ahead_BO[: self._span]
            score_SO = (now_SO / self._scale_I1[here]).square_().masked_fill_(self.zero_IO[here], -1.0)
            self.zero_IO[here] |= self._chosen(score_SO, here)
        super().begin(column, ahead_BO)

    def _chosen(self, score_SO: Tensor, here: slice) -> Tensor:
        if self._pattern:
            return torch.stack(lowest_of(score_SO.unbind(0), self._pattern.zeros))
        outputs = score_SO.shape[1]
        return lowest(
            score_SO,
            count_of_zeros(self._share, outputs * here.stop) - count_of_zeros(self._share, outputs * here.start),
        )


def block_length(group: int | None, wanted: int) -> int:
    """A lazy block near `wanted` columns that never splits a group whose scales are still to be fitted."""
    if group is None:
        return wanted
    return group * max(1, wanted // group)
