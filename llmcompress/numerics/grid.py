"""Quantization grids: fit scales, round, dequantize. O = outputs, I = inputs, G = groups of inputs, N = group length.

Integer codes are signed in both modes, `-2^(b-1) … 2^(b-1)-1`, as compressed-tensors stores them; codes of other number
formats are defined in `numerics/formats.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional

from llmcompress.numerics.formats import (
    E4M3,
    STORED,
    NumberFormat,
    ScaleKind,
)
from llmcompress.numerics.packing import TRITS_IN_BYTE


@dataclass(frozen=True)
class Grid:
    """Which values a weight may become, and how many inputs share a scale (`group=None`: the whole row)."""

    bits: int
    symmetric: bool = True
    group: int | None = None
    number: NumberFormat | None = None
    """What is scaled: a float format; None: integers. Only integers can be asymmetric."""
    scales: ScaleKind = STORED
    positive_scales: bool = False
    """Whether a reader of the codes takes no negative scale; only where grids would have some (`mirrors`)."""
    ternary: bool = False
    """Only -1, 0 and 1, in fields of two bits."""

    @classmethod
    def of(cls, number: NumberFormat, group: int | None = None, scales: ScaleKind = STORED) -> Grid:
        """A grid of floats."""
        return cls(number.bits, True, group, number, scales)

    @property
    def low(self) -> int:
        """Smallest code."""
        if self.ternary:
            return -1
        return -(1 << (self.bits - 1)) if self.number is None else self.number.low

    @property
    def high(self) -> int:
        """Largest code."""
        return 1 if self.ternary else self.low + (1 << self.bits) - 1

    @property
    def mirrors(self) -> bool:
        """Whether scales may be negative: there is one more code below zero than above, and the longer side of a group
        then lies there whichever it is. At 8 bits nothing is gained, and integer kernels expect positive scales.
        """
        integers = self.number is None and not self.ternary
        return integers and self.symmetric and self.bits < 8 and not self.positive_scales

    @property
    def own_bits(self) -> Fraction:
        """Bits per code without padding; ternary codes are packed five to a byte."""
        return Fraction(8, TRITS_IN_BYTE) if self.ternary else Fraction(self.bits)

    def code_bits(self, codes: int) -> int:
        """Bits of that many codes without padding."""
        return math.ceil(codes * self.own_bits)

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

    def rows(self, piece: slice) -> Fitted:
        """The same for some of the outputs."""
        if self.grid.scales.single:
            return self
        return replace(self, scale_OG=self.scale_OG[piece], zero_OG=self.zero_OG[piece])

    def stored_OG(self) -> Tensor:
        """The scales as they are stored: of two levels, the E4M3 values."""
        return self.scale_OG if self.shared is None else E4M3.nearest(self.scale_OG * self.shared)


def round_to_codes(weight_OI: Tensor, fitted: Fitted) -> Tensor:
    """Nearest codes, as int8."""
    grid, inputs = fitted.grid, weight_OI.shape[1]
    scaled_OGN = grouped(weight_OI, grid) / fitted.scale_OG[..., None]
    if grid.number is not None:
        codes_OGN = grid.number.encode(scaled_OGN)
    else:
        codes_OGN = scaled_OGN.add_(fitted.zero_OG[..., None]).round_().clamp_(grid.low, grid.high).to(torch.int8)
    return flat(codes_OGN, inputs)


def restore(codes_OI: Tensor, fitted: Fitted) -> Tensor:
    """The float weights that codes stand for, in the scales' dtype."""
    grid, inputs, dtype = fitted.grid, codes_OI.shape[1], fitted.scale_OG.dtype
    codes_OGN, scale_OG1 = grouped(codes_OI, grid), fitted.scale_OG[..., None]
    if grid.number is not None:
        # one rounding, of the product: table values and two-level scales have no exact form in 16 bits
        work = torch.promote_types(dtype, torch.float32)
        return flat(grid.number.decode(codes_OGN, work).mul_(scale_OG1.to(work)).to(dtype), inputs)
    return flat(codes_OGN.to(dtype, copy=True).sub_(fitted.zero_OG[..., None]).mul_(scale_OG1), inputs)


def spread(per_group_OG: Tensor, grid: Grid, inputs: int) -> Tensor:
    """One value per input instead of one per group (broadcastable when the row is one group)."""
    if grid.group is None:
        return per_group_OG
    return per_group_OG.repeat_interleave(grid.group, dim=1)[:, :inputs]


def output_error(difference_OI: Tensor, gram_II: Tensor) -> Tensor:
    """Σ over tokens and outputs of (ΔW x)², from the Gram matrix alone: tr(ΔW G ΔWᵀ)."""
    return row_errors(difference_OI, gram_II).sum(dtype=torch.float64)


def row_errors(difference_OI: Tensor, gram_II: Tensor) -> Tensor:
    """The same for every output separately."""
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


def row_pieces(weight_OI: Tensor) -> list[slice]:
    """Rows in pieces of about two million weights: temporary tensors then stay small, in the cache."""
    outputs, inputs = weight_OI.shape
    rows = max(1, (1 << 21) // max(inputs, 1))
    return [slice(start, start + rows) for start in range(0, outputs, rows)]


def grouped(weight_OI: Tensor, grid: Grid) -> Tensor:
    """O×I → O×G×N; a ragged last group is filled with zeros, which no range or error notices."""
    outputs, inputs = weight_OI.shape
    length = grid.length(inputs)
    missing = grid.groups(inputs) * length - inputs
    if missing:  # otherwise a view: padding by nothing would copy
        weight_OI = functional.pad(weight_OI, (0, missing))
    return weight_OI.reshape(outputs, -1, length)


def flat(grouped_OGN: Tensor, inputs: int) -> Tensor:
    """Back to O×I."""
    return grouped_OGN.flatten(1)[:, :inputs].contiguous()
