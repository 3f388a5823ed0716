"""Leaves of expressions: ordinary weights, codes, codebooks, tensor networks.

O = outputs, I = inputs, C = columns, L = levels, N = weights in full precision.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from llmcompress.modules.expression import Expression
from llmcompress.modules.rounded_inputs import round_inputs
from llmcompress.modules.scheme import Activations, Scheme
from llmcompress.numerics.codebook import level_values
from llmcompress.numerics.quantized import QuantizedTensor


@dataclass(frozen=True, eq=False)
class Leaf(Expression):
    """One matrix and a bias."""

    bias: Tensor | None = field(default=None, kw_only=True)

    @override
    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.dense_weight(), self.bias)

    @override
    def dense_bias(self) -> Tensor | None:
        return self.bias


@dataclass(frozen=True, eq=False)
class Dense(Leaf):
    """An ordinary linear: O×I, whatever the layout of the module's own parameter."""

    weight: Tensor

    @property
    @override
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.weight.shape
        return outputs, inputs

    @override
    def dense_weight(self) -> Tensor:
        return self.weight


@dataclass(frozen=True, eq=False)
class Quantized(Leaf):
    """Codes and scales; with `activations`, inputs are rounded first, as `Scheme` says.

    `input_scale` is what calibration fixed of that rounding.
    """

    tensor: QuantizedTensor
    activations: Activations | None = None
    input_scale: Tensor | None = None

    @property
    def scheme(self) -> Scheme:
        """Grid and activations under one name."""
        return Scheme(self.tensor.grid, self.activations)

    @property
    @override
    def is_linear(self) -> bool:
        return self.activations is None

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.tensor.shape

    @override
    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(self.rounded(x), self.tensor.dense(), self.bias)

    def rounded(self, x: Tensor) -> Tensor:
        """What the matrix is given."""
        return round_inputs(x, self.scheme, self.input_scale) if self.activations else x

    @override
    def dense_weight(self) -> Tensor:
        return self.tensor.dense()


@dataclass(frozen=True, eq=False)
class ColumnCodes:
    """Columns whose codebooks have equally many levels: code `codes_CO[c, o]` means `levels_CL[c, code]`."""

    columns_I: Tensor
    """Which columns of the matrix, as a mask."""
    codes_CO: Tensor
    levels_CL: Tensor


@dataclass(frozen=True, eq=False)
class Codebook(Leaf):
    """A codebook for every column, and a few weights in full at flat places, whatever their codes say."""

    columns: tuple[ColumnCodes, ...]
    place_N: Tensor
    value_N: Tensor
    size: tuple[int, int]

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.size

    @override
    def dense_weight(self) -> Tensor:
        outputs, inputs = self.size
        weight_IO = torch.empty(inputs, outputs, dtype=self.value_N.dtype, device=self.value_N.device)
        for each in self.columns:
            weight_IO[each.columns_I] = level_values(each.codes_CO, each.levels_CL)
        weight_OI = weight_IO.T.contiguous()
        weight_OI.view(-1)[self.place_N.long()] = self.value_N
        return weight_OI


@dataclass(frozen=True, eq=False)
class Contraction(Leaf):
    """A matrix as a network of small tensors: `einsum` of them, reshaped to `size`."""

    equation: str
    tensors: tuple[Tensor, ...]
    size: tuple[int, int]

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.size

    @override
    def dense_weight(self) -> Tensor:
        full: Tensor = torch.einsum(self.equation, *self.tensors)
        return full.reshape(self.size)
