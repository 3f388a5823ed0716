"""A quantized matrix: its codes and scales, its values, and its size. O = outputs, I = inputs, G = groups."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from llmcompress.numerics.grid import Fitted, Grid, restore, spread


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Codes on a grid with the scales as they are stored. Two are equal only when they are the same object.

    The scales' dtype is that of the weights that `dense` restores.
    """

    codes: Tensor
    """O×I int8: integers, bit patterns of 8-bit floats or places in a table, as the grid's number format says."""
    scale: Tensor
    """O×G, or 1×G where all outputs share it; of two-level scales the E4M3 values, of super-blocks the integers."""
    zero_point: Tensor | None
    """O×G int8 of an asymmetric grid; of one with minima, their integers."""
    shared_scale: Tensor | None
    """Float32: what two-level scales are divided by, one element; what the integers of super-blocks are multiplied by,
    O×S×1 or, with minima, O×S×2."""
    grid: Grid

    @classmethod
    def of(cls, codes_OI: Tensor, fitted: Fitted) -> QuantizedTensor:
        """From the result of rounding."""
        return cls(codes_OI, fitted.stored_OG(), fitted.stored_zero_OG(), fitted.shared, fitted.grid)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        outputs, inputs = self.codes.shape
        return outputs, inputs

    @property
    def weights(self) -> int:
        """How many the codes stand for."""
        return self.codes.numel()

    @property
    def fitted(self) -> Fitted:
        """The grid with its numbers, as the arithmetic of `numerics/grid.py` takes it."""
        return Fitted.of_stored(self.grid, self.scale, self.zero_point, self.shared_scale)

    def dense(self) -> Tensor:
        """The weights that the codes stand for, O×I in the scales' dtype: what ships, bit for bit."""
        return restore(self.codes, self.fitted).to(self.scale.dtype)

    def rows(self, chosen: slice | Tensor) -> QuantizedTensor:
        """The same for some of the outputs, in the order chosen."""
        scale_OG = self.scale if self.grid.scales.single else self.scale[chosen]
        zero_OG = None if self.zero_point is None else self.zero_point[chosen]
        shared = self.shared_scale
        if shared is not None and self.grid.scales.super_block is not None:
            shared = shared[chosen]
        return replace(self, codes=self.codes[chosen], scale=scale_OG, zero_point=zero_OG, shared_scale=shared)

    def centred_codes(self) -> Tensor:
        """O×I int16: each code less its zero point (or the code of 0), so that 0 is a weight of zero.

        Of a grid with minima, which need not have a zero, less the code nearest to it.
        """
        codes_OI, inputs = self.codes.to(torch.int16), self.shape[1]
        if self.grid.number is not None:
            return codes_OI - self.grid.number.encode(torch.zeros(1, device=self.codes.device)).to(torch.int16)
        if self.zero_point is None:
            return codes_OI
        if self.grid.scales.minima:
            nearest_OG = self.fitted.zero_OG.round().clamp(self.grid.low, self.grid.high).to(torch.int16)
            return codes_OI - spread(nearest_OG, self.grid, inputs)
        return codes_OI - self.zero_point.to(torch.int16).repeat_interleave(self.grid.length(inputs), 1)[:, :inputs]

    @property
    def bits(self) -> int:
        """Codes without padding, scales in their dtype here, and packed zero points."""
        return self.grid.code_bits(self.weights) + self.grid.scale_bits(*self.shape, 8 * self.scale.element_size())

    @property
    def bits_per_weight(self) -> float:
        """`bits` ÷ weights."""
        return self.bits / self.weights


def regrouped(tensor: QuantizedTensor, group: int | None) -> QuantizedTensor:
    """The same codes with every scale repeated over shorter groups, which must divide the tensor's own.

    A row that was one group, or a ragged last group, must consist of whole groups then.
    """
    grid, inputs = tensor.grid, tensor.shape[1]
    if group == grid.group or (group is None and grid.groups(inputs) == 1):
        return replace(tensor, grid=replace(grid, group=group))
    length = grid.length(inputs)
    assert group is not None and length % group == 0 and inputs % group == 0
    repeats, groups = length // group, inputs // group

    def repeated(value_OG: Tensor) -> Tensor:
        return value_OG.repeat_interleave(repeats, 1)[:, :groups]

    zero_OG = None if tensor.zero_point is None else repeated(tensor.zero_point)
    return replace(tensor, scale=repeated(tensor.scale), zero_point=zero_OG, grid=replace(grid, group=group))


def error_in_steps(tensor: QuantizedTensor, dtype: torch.dtype) -> float:
    """How far scales rounded to `dtype` move any weight, in steps of its grid; 0: they are exact."""
    grid, scale_OG = tensor.grid, tensor.scale.float()
    moved_OG = (scale_OG.to(dtype).float() - scale_OG).abs() * (grid.high - grid.low)
    steps_OG = torch.where(scale_OG == 0, torch.zeros_like(moved_OG), moved_OG / scale_OG.abs())
    return float(steps_OG.max()) if steps_OG.numel() else 0.0


def unfolded(tensor: QuantizedTensor, grid: Grid) -> QuantizedTensor:
    """Codes from which zero points were subtracted, with zero points again: the same weights on the asymmetric `grid`.

    Which zero points were subtracted cannot be known where a group does not use all codes; the lowest that fit are
    taken.
    """
    inputs = tensor.shape[1]
    smallest_OG = _smallest(tensor.codes, grid)
    zero_OG = (grid.low - smallest_OG).clamp(grid.low, grid.high)
    codes_OI = tensor.codes.to(torch.int16) + spread(zero_OG, grid, inputs)
    assert codes_OI.min() >= grid.low and codes_OI.max() <= grid.high, "these codes are not on that grid"
    return QuantizedTensor(codes_OI.to(torch.int8), tensor.scale, zero_OG.to(torch.int8), None, grid)


def _smallest(codes_OI: Tensor, grid: Grid) -> Tensor:
    """O×G int16: the smallest code of every group; a ragged last group is as long as it is."""
    outputs, inputs = codes_OI.shape
    length = grid.length(inputs)
    padded_OI = functional.pad(codes_OI.to(torch.int16), (0, grid.groups(inputs) * length - inputs), value=_LARGE)
    return padded_OI.reshape(outputs, -1, length).amin(-1)


_LARGE = 2**14
"""More than any code."""
