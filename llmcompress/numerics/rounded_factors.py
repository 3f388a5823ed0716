"""Quantized low-rank factors. O = outputs, I = inputs, R = rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.numerics.grid import Fitted, Grid, output_error, restore, round_to_codes
from llmcompress.numerics.low_rank import Factors, best_left, best_right
from llmcompress.numerics.ranges import fit


@dataclass(frozen=True)
class Codes:
    """A rounded matrix."""

    codes: Tensor
    fitted: Fitted

    @classmethod
    def of(cls, matrix: Tensor, grid: Grid, scale_dtype: torch.dtype) -> Codes:
        """Nearest codes on ranges that lose least."""
        fitted = fit(matrix, grid, scale_dtype=scale_dtype, search="mse")
        return cls(round_to_codes(matrix, fitted), fitted)

    def dense(self) -> Tensor:
        """The matrix that the codes stand for."""
        return restore(self.codes, self.fitted)


@dataclass(frozen=True)
class RoundedFactors:
    """Both factors as codes."""

    left: Codes
    right: Codes

    def product(self) -> Tensor:
        """The matrix they stand for, O×I."""
        return self.left.dense() @ self.right.dense()


def round_factors(
    factors: Factors, target_OI: Tensor, gram_II: Tensor, grid: Grid, *, scale_dtype: torch.dtype, alternations: int = 5
) -> RoundedFactors:
    """Round both factors so that their product stays near the target on the inputs that the Gram matrix saw.

    Each in turn is rounded and the other fitted to what became of it; the best pair seen is kept. The first pair is
    the plainly rounded one.

    Source: Saha et al., arXiv 2405.18886, Algorithm 2 (LPLR), whose library alternates five times.
    """
    left_OR, right_RI = factors.left_OR, factors.right_RI
    best = RoundedFactors(Codes.of(left_OR, grid, scale_dtype), Codes.of(right_RI, grid, scale_dtype))
    least = float(output_error(best.product() - target_OI, gram_II))
    for _ in range(alternations):
        right = Codes.of(right_RI, grid, scale_dtype)
        left = Codes.of(best_left(target_OI, right.dense(), gram_II), grid, scale_dtype)
        found = RoundedFactors(left, right)
        error = float(output_error(found.product() - target_OI, gram_II))
        if error < least:
            best, least = found, error
        right_RI = best_right(target_OI, left.dense())
    return best
