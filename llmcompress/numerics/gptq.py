"""GPTQ on one matrix: the order of its columns, the factor for that order, the sweep. O = outputs, I = inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.numerics.columns import (
    ColumnTreatment,
    DropWeights,
    InverseFactor,
    RoundToGrid,
    block_length,
    inverse_factor,
    sweep_columns_,
)
from llmcompress.numerics.grid import Fitted, Grid
from llmcompress.numerics.ranges import RangeSearch


@dataclass(frozen=True)
class Visit:
    """The order in which the columns of an input are quantized (None: as they are), and the factor for that order.

    All weights that read the input share it.
    """

    order_I: Tensor | None
    visit_I: Tensor
    factor: InverseFactor | None
    """None where the Gram matrix has no inverse."""
    block: int = 128
    """Columns of a lazy update."""

    @classmethod
    def of(cls, gram_II: Tensor, *, damping: float, act_order: bool, block: int = 128) -> Visit:
        """By falling input energy with `act_order`."""
        diagonal_I = gram_II.diagonal()
        order_I = diagonal_I.argsort(descending=True, stable=True) if act_order else None
        visit_I = torch.arange(len(diagonal_I), device=diagonal_I.device) if order_I is None else order_I
        return cls(order_I, visit_I, inverse_factor(gram_II, damping, order_I), block)


@dataclass(frozen=True)
class Swept:
    """What a sweep leaves of a matrix."""

    codes_OI: Tensor
    fitted: Fitted
    loss_O: Tensor
    """For every output Σ ΔW (G + ridge) ΔWᵀ."""


def swept_codes(
    weight_OI: Tensor,
    grid: Grid,
    gram_II: Tensor,
    visit: Visit,
    *,
    scale_dtype: torch.dtype,
    search: RangeSearch = "mse",
    pruned_OI: Tensor | None = None,
) -> Swept:
    """Codes and their grid, every error pushed onto the columns still to come; `visit` has a factor.

    What is `pruned_OI` stays zero, whatever the errors of other columns would make of it.

    Source: Frantar et al., arXiv 2210.17323, Algorithm 1.
    """
    order_I, visit_I, factor = visit.order_I, visit.visit_I, visit.factor
    assert factor is not None
    rounding = RoundToGrid(weight_OI, grid, scale_dtype=scale_dtype, search=search, gram_II=gram_II, order_I=order_I)
    visited_IO = weight_OI.T[visit_I]
    treat: ColumnTreatment = rounding
    if pruned_OI is not None and bool(pruned_OI.any()):
        treat = DropWeights(pruned_OI.T[visit_I], rounding)
    lazy = visit.block if order_I is not None else block_length(grid.span, visit.block)
    loss_O = sweep_columns_(visited_IO, factor.upper_II, treat, block=lazy)
    return Swept(rounding.codes_IO.T.contiguous(), rounding.fitted, loss_O)
