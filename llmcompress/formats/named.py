"""Tensors of one module in a checkpoint, by the last part of their names, with or without values. O = outputs, I =
inputs.

Every format here is a pure pair: `pack` returns the named tensors of one module, `unpack` reverses it. A plan counts
what `pack` returns for tensors without values, so no layout is defined twice.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmcompress.modules.expression_leaves import Dense, Quantized
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.quantized import QuantizedTensor

Named = Mapping[str, Tensor]
"""By what follows the module's name: `weight`, `weight_scale`, `bias`."""

Kind = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape."""


def kinds(tensors: Named) -> dict[str, Kind]:
    """What a checkpoint's header says of them."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def empty_dense(shape: tuple[int, int], dtype: torch.dtype, *, bias: bool) -> Dense:
    """An ordinary linear of that shape (O, I) without contents."""
    with torch.device("meta"):
        return Dense(torch.empty(shape, dtype=dtype), bias=torch.empty(shape[0], dtype=dtype) if bias else None)


def empty_codes(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype, *, bias: bool) -> Quantized:
    """A linear of that shape (O, I) that holds codes, without contents; `dtype` is that of its scales and bias."""
    grid = scheme.weights
    scales, shared = grid.scale_shape(*shape), grid.shared_shape(*shape)
    with torch.device("meta"):
        tensor = QuantizedTensor(
            torch.empty(shape, dtype=torch.int8),
            torch.empty(scales, dtype=dtype),
            None if grid.symmetric else torch.empty(scales, dtype=torch.int8),
            None if shared is None else torch.empty(shared),
            grid,
        )
        return Quantized(
            tensor,
            scheme.activations,
            torch.empty(1) if scheme.measures_inputs else None,
            bias=torch.empty(shape[0], dtype=dtype) if bias else None,
        )
