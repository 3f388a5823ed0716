"""The tensors of a quantized linear in our own format: codes without padding. O = outputs, I = inputs, B = bytes of a
row.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from llmcompress.formats.named import Kind, Named, empty_codes, kinds
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.formats import scales_from_bytes, scales_to_bytes
from llmcompress.numerics.grid import Grid
from llmcompress.numerics.packing import (
    pack_bits,
    pack_trits,
    packed_bytes,
    packed_trit_bytes,
    unpack_bits,
    unpack_trits,
)
from llmcompress.numerics.quantized import QuantizedTensor

NAMES = frozenset({"weight", "scale", "zero_point", "shared_scale", "input_scale"})
"""What `pack` may return besides the bias."""


def pack(form: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    """`weight` is uint8, O×B.

    It has another shape than the stock linear's weight, so a loader without our plug-in refuses the file: codes of a
    whole byte lie in one row. Float32 numbers are stored as int32: casting a model leaves those alone.
    """
    tensor, grid = form.tensor, form.tensor.grid
    packed_OB = pack_trits(tensor.codes) if grid.ternary else pack_bits(tensor.codes, grid.bits, grid.low)
    if grid.scales.super_block is not None:
        return {"weight": packed_OB, **_super_blocks(tensor), **_bias(form, dtype)}
    scale = scales_to_bytes(tensor.scale, grid.scales)
    fixed = form.input_scale
    found = {
        "weight": packed_OB.flatten() if grid.bits == 8 else packed_OB,
        "scale": scale.to(dtype) if grid.scales.bits is None else scale,
        "zero_point": tensor.zero_point,
        "input_scale": _bits(fixed) if form.activations == "group" or fixed is None else fixed.to(dtype),
        "shared_scale": _bits(tensor.shared_scale),
        **_bias(form, dtype),
    }
    return {name: each for name, each in found.items() if each is not None}


def unpack(found: Named, scheme: Scheme, inputs: int, dtype: torch.dtype) -> Quantized:
    """What was packed, bit for bit; scales that lie in the file as bytes become `dtype`."""
    grid = scheme.weights
    if grid.scales.super_block is not None:
        return Quantized(_from_super_blocks(found, grid, inputs, dtype), bias=found.get("bias"))
    scale, shared, fixed = found["scale"], found.get("shared_scale"), found.get("input_scale")
    return Quantized(
        QuantizedTensor(
            _codes(found["weight"], grid, inputs),
            scales_from_bytes(scale, grid.scales, dtype),
            found.get("zero_point"),
            None if shared is None else shared.view(torch.float32),
            grid,
        ),
        scheme.activations,
        fixed.view(torch.float32) if fixed is not None and scheme.activations == "group" else fixed,
        bias=found.get("bias"),
    )


@cache
def tensors(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype, *, bias: bool) -> dict[str, Kind]:
    """Names, dtypes and shapes of what `pack` gives for a linear of that shape (O, I)."""
    return kinds(pack(empty_codes(shape, scheme, dtype, bias=bias), dtype))


def _super_blocks(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The integers of scales and minima without padding, and what super-blocks share as the bits of its float16."""
    low, bits = tensor.grid.scales.integers[0], tensor.grid.scales.bits
    assert bits is not None and tensor.shared_scale is not None
    found = {
        "scale": pack_bits(tensor.scale.to(torch.int8), bits, min(low, 0)),
        "shared_scale": tensor.shared_scale.to(torch.float16).view(torch.int16),
    }
    if tensor.zero_point is not None:
        found["zero_point"] = pack_bits(tensor.zero_point, bits, 0)
    return found


def _from_super_blocks(found: Named, grid: Grid, inputs: int, dtype: torch.dtype) -> QuantizedTensor:
    low, bits, groups = min(grid.scales.integers[0], 0), grid.scales.bits, grid.groups(inputs)
    assert bits is not None
    minima = unpack_bits(found["zero_point"], bits, 0, groups) if grid.scales.minima else None
    return QuantizedTensor(
        _codes(found["weight"], grid, inputs),
        unpack_bits(found["scale"], bits, low, groups).to(dtype),
        minima,
        found["shared_scale"].view(torch.float16).float(),
        grid,
    )


def _bias(form: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    return {} if form.bias is None else {"bias": form.bias.detach().to(dtype)}


def _codes(weight: Tensor, grid: Grid, inputs: int) -> Tensor:
    if grid.ternary:
        return unpack_trits(weight.reshape(-1, packed_trit_bytes(inputs)), inputs)
    return unpack_bits(weight.reshape(-1, packed_bytes(inputs, grid.bits)), grid.bits, grid.low, inputs)


def _bits(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.float().view(torch.int32)
