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

    @property
    def span(self) -> int | None:
        """Inputs that must stay together, as they share scales: a group or a super-block; None: the whole row."""
        return self.scales.super_block or self.group

    def shared_shape(self, outputs: int, inputs: int) -> tuple[int, ...] | None:
        """Shape of the second level of scales; of super-blocks outputs, super-blocks, and 1 or 2 (with minima)."""
        if self.scales.super_block is not None:
            return outputs, -(-inputs // self.scales.super_block), 2 if self.scales.minima else 1
        return (1,) if self.scales.shared_bits else None

    def scale_bits(self, outputs: int, inputs: int, checkpoint_bits: int) -> int:
        """Stored bits of all scales, minima and zero points of a matrix."""
        rows, groups = self.scale_shape(outputs, inputs)
        has_zero = not self.symmetric and not self.scales.minima
        one = self.scales.width(checkpoint_bits) + (self.bits if has_zero else 0)
        shared = self.shared_shape(outputs, inputs)
        return rows * groups * one + (0 if shared is None else math.prod(shared) * self.scales.shared_bits)


@dataclass(frozen=True)
class Fitted:
    """A grid with its numbers: `scale_OG` holds values of the stored type, `zero_OG` integers, as floats both.

    `shared` (float32) is the second level of scales: one element by which E4M3 values were divided; or O×S×1 float16
    values that the integers of S super-blocks in a row are multiplied by, O×S×2 where groups have minima. The zero of a
    group with a minimum is the code, no integer, at which its line passes through zero.
    """

    grid: Grid
    scale_OG: Tensor
    zero_OG: Tensor
    shared: Tensor | None = None

    @classmethod
    def of_stored(cls, grid: Grid, stored_OG: Tensor, zero_OG: Tensor | None, shared: Tensor | None) -> Fitted:
        """From scales as they are stored."""
        if grid.scales.super_block is not None:
            assert shared is not None, "super-blocks share a scale"
            return cls._of_integers(grid, stored_OG.float(), zero_OG, shared.float())
        scale_OG = stored_OG if shared is None else stored_OG.float() / shared
        return cls(
            grid, scale_OG, torch.zeros_like(scale_OG) if zero_OG is None else zero_OG.to(scale_OG.dtype), shared
        )

    @classmethod
    def _of_integers(cls, grid: Grid, integer_OG: Tensor, minimum_OG: Tensor | None, shared_OSL: Tensor) -> Fitted:
        scale_OG = integer_OG * of_groups(shared_OSL[..., 0], grid, integer_OG.shape[1])
        if minimum_OG is None:
            return cls(grid, scale_OG, torch.zeros_like(scale_OG), shared_OSL)
        step_OG = of_groups(shared_OSL[..., 1], grid, integer_OG.shape[1])
        return cls(grid, scale_OG, minimum_OG.float() * step_OG / scale_OG + grid.low, shared_OSL)

    def rows(self, piece: slice | Tensor) -> Fitted:
        """The same for some of the outputs."""
        if self.grid.scales.single:
            return self
        shared = self.shared
        if shared is not None and self.grid.scales.super_block is not None:
            shared = shared[piece]
        return replace(self, scale_OG=self.scale_OG[piece], zero_OG=self.zero_OG[piece], shared=shared)

    def stored_OG(self) -> Tensor:
        """The scales as they are stored: of two levels the E4M3 values, of super-blocks the integers."""
        if self.shared is None:
            return self.scale_OG
        if self.grid.scales.super_block is None:
            return E4M3.nearest(self.scale_OG * self.shared)
        return (self.scale_OG / of_groups(self.shared[..., 0], self.grid, self.scale_OG.shape[1])).round()

    def stored_zero_OG(self) -> Tensor | None:
        """Zero points as they are stored, int8; the integers of minima where groups have these instead."""
        if self.grid.symmetric:
            return None
        zero_OG = self._minimum_integers() if self.grid.scales.minima else self.zero_OG
        return zero_OG.to(torch.int8)

    def minimum_OG(self) -> Tensor:
        """What is subtracted in every group of a grid with minima."""
        return self._minimum_integers() * self._minimum_steps()

    def _minimum_integers(self) -> Tensor:
        exact_OG = (self.zero_OG - self.grid.low) * self.scale_OG / self._minimum_steps()
        return exact_OG.round().clamp(0, self.grid.scales.integers[1])

    def _minimum_steps(self) -> Tensor:
        assert self.shared is not None, "super-blocks share a scale"
        return of_groups(self.shared[..., 1], self.grid, self.scale_OG.shape[1])


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
    if grid.scales.minima:
        from_low_OGN = codes_OGN.to(dtype, copy=True).sub_(grid.low)
        return flat(from_low_OGN.mul_(scale_OG1).sub_(fitted.minimum_OG()[..., None]), inputs)
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


def of_groups(shared_OS: Tensor, grid: Grid, groups: int) -> Tensor:
    """What super-blocks share, for each of their groups."""
    assert grid.scales.super_block is not None and grid.group is not None
    return shared_OS.repeat_interleave(grid.scales.super_block // grid.group, 1)[:, :groups]


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
