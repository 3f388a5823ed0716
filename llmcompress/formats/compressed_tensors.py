"""The tensors of a quantized linear in compressed-tensors. O = outputs, I = inputs, G = groups of inputs.

How loaders were found to treat each layout: docs/decisions/0004-saved-formats.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from llmcompress.formats.named import Kind, Named, empty_codes, kinds
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.formats import (
    E2M1,
    E4M3,
    POWER_OF_TWO,
    SINGLE,
    STORED,
    TWO_LEVEL,
    NumberFormat,
    ScaleKind,
    scales_from_bytes,
    scales_to_bytes,
)
from llmcompress.numerics.grid import Grid, spread
from llmcompress.numerics.packing import pack_bits, pack_words, unpack_bits, unpack_words
from llmcompress.numerics.quantized import QuantizedTensor

ZeroPoints = Literal["folded", "packed"]
"""Of 2- and 4-bit asymmetric grids. Folded: subtracted from the codes, which then need a wider field but load anywhere;
packed: the format's own way, which transformers 5 with compressed-tensors 0.18 to 0.20 only loads when asked to
dequantize."""

LayoutName = Literal[
    "pack-quantized",
    "int-quantized",
    "naive-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
]

NAMES = frozenset(
    {
        "weight",
        "weight_packed",
        "weight_shape",
        "weight_scale",
        "weight_global_scale",
        "weight_zero_point",
        "input_scale",
        "input_global_scale",
    }
)
"""What `pack` may return besides the bias."""

_FLOATS: dict[tuple[NumberFormat, ScaleKind], LayoutName] = {
    (E4M3, STORED): "float-quantized",
    (E4M3, SINGLE): "float-quantized",
    (E4M3, POWER_OF_TWO): "mxfp8-quantized",
    (E2M1, POWER_OF_TWO): "mxfp4-pack-quantized",
    (E2M1, TWO_LEVEL): "nvfp4-pack-quantized",
}
"""Float formats that it can represent."""


@dataclass(frozen=True)
class Layout:
    """How a scheme's codes are stored: `format` is the library's name, `bits` the width of a field."""

    format: LayoutName
    bits: int
    """Bits of the grid as the loader sees it; unpacked formats spend a whole byte on it."""
    symmetric: bool
    """False: zero points are stored; True for an asymmetric scheme: they are subtracted from the codes."""

    @property
    def packs_zero_points(self) -> bool:
        """Zero points share int32 words like codes do; otherwise each takes a byte."""
        return self.format == "pack-quantized" and not self.symmetric

    @property
    def packs_floats(self) -> bool:
        """Two 4-bit floats share a byte."""
        return self.format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized")

    @property
    def bits_on_disk(self) -> int:
        """Stored bits per code."""
        return self.bits if self.format == "pack-quantized" or self.packs_floats else 8

    def grid(self, scheme: Scheme) -> Grid:
        """The grid that a loader sees: of integers, fields of this width, zero points only where they are stored."""
        grid = scheme.weights
        return grid if grid.number is not None else Grid(self.bits, self.symmetric, grid.group)


def can_name(scheme: Scheme) -> bool:
    """Whether the format has a word for these weights at all."""
    grid = scheme.weights
    if grid.number is None:
        return grid.scales.super_block is None
    return (grid.number, grid.scales) in _FLOATS


def layout_of(scheme: Scheme, *, packable: bool = True, zero_points: ZeroPoints = "folded") -> Layout:
    """The layout that every supported version of transformers and the library reads alike (unless `packed`).

    Only 2, 4 and 8 bits are packed the same way by all versions, and transformers 5 cannot load packed zero points.
    Code minus zero point needs one bit more and no zero point. `packable` is False where loaders build a subclass of
    `nn.Linear` (Falcon): 5 fails on its missing `weight`. The scheme must be one that `can_name` knows.
    """
    grid = scheme.weights
    if grid.number is not None:
        return Layout(_FLOATS[grid.number, grid.scales], grid.bits, symmetric=True)
    if scheme.activations:
        return Layout("int-quantized", grid.bits, grid.symmetric)
    if zero_points == "packed" and packable and not grid.symmetric and grid.bits in (2, 4):
        return Layout("pack-quantized", grid.bits, symmetric=False)
    needed = grid.bits if grid.symmetric else grid.bits + 1
    if needed > 8 or not packable:
        return Layout("naive-quantized", grid.bits, grid.symmetric)
    return Layout("pack-quantized", next(width for width in (2, 4, 8) if width >= needed), symmetric=True)


def pack(form: Quantized, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a linear as the library's compressors lay them out; scales and bias in `dtype`."""
    tensors = _codes(form.tensor, layout) | _scales(form, dtype)
    zero_OG = form.tensor.zero_point
    if zero_OG is not None and not layout.symmetric:
        packed = layout.packs_zero_points
        tensors["weight_zero_point"] = pack_words(zero_OG.T, layout.bits).T.contiguous() if packed else zero_OG
    if form.bias is not None:
        tensors["bias"] = form.bias.detach().to(dtype)
    return tensors


def unpack(found: Named, grid: Grid, dtype: torch.dtype) -> QuantizedTensor:
    """Codes, scales and zero points as a loader sees them: `grid` is `Layout.grid`.

    Zero points that were subtracted from the codes do not come back; scales that are bytes become `dtype`.
    """
    scale, shared, zero = found["weight_scale"], found.get("weight_global_scale"), found.get("weight_zero_point")
    if "weight_shape" in found:
        outputs, inputs = found["weight_shape"].tolist()
        codes_OI = unpack_words(found["weight_packed"], grid.bits, inputs)
        if zero is not None:
            zero = unpack_words(zero.T, grid.bits, outputs).T
    elif "weight_packed" in found:
        packed_OB = found["weight_packed"]
        codes_OI = unpack_bits(packed_OB, grid.bits, grid.low, 8 // grid.bits * packed_OB.shape[1])
    else:
        codes_OI = found["weight"].view(torch.int8)
    if grid.scales == TWO_LEVEL:
        scale = scale.view(torch.uint8)
    elif grid.scales.single:
        scale = scale.reshape(1, 1)
    return QuantizedTensor(codes_OI, scales_from_bytes(scale, grid.scales, dtype), zero, shared, grid)


@cache
def tensors(
    shape: tuple[int, int], scheme: Scheme, layout: Layout, dtype: torch.dtype, *, bias: bool
) -> dict[str, Kind]:
    """Names, dtypes and shapes of what `pack` gives for a linear of that shape (O, I)."""
    return kinds(pack(empty_codes(shape, scheme, dtype, bias=bias), layout, dtype))


def _codes(tensor: QuantizedTensor, layout: Layout) -> dict[str, Tensor]:
    codes_OI, grid = tensor.codes, tensor.grid
    if layout.packs_floats:
        return {"weight_packed": pack_bits(codes_OI, grid.bits, grid.low)}
    if grid.number is not None:
        return {"weight": codes_OI.view(torch.float8_e4m3fn)}
    if tensor.zero_point is not None and layout.symmetric:
        codes_OI = codes_OI - spread(tensor.zero_point, grid, tensor.shape[1])
    if layout.format == "pack-quantized":
        return {"weight_packed": pack_words(codes_OI, layout.bits), "weight_shape": torch.tensor(tensor.shape)}
    return {"weight": codes_OI}


def _scales(form: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    tensor, kind, fixed = form.tensor, form.tensor.grid.scales, form.input_scale
    scale = scales_to_bytes(tensor.scale, kind)
    if kind == TWO_LEVEL:
        scale = scale.view(torch.float8_e4m3fn)
    elif kind.single:
        scale = scale.reshape(1)
    tensors = {"weight_scale": scale.to(dtype) if kind.bits is None else scale}
    if tensor.shared_scale is not None:
        tensors["weight_global_scale"] = tensor.shared_scale
    if fixed is not None:
        measured = form.activations == "group"
        tensors["input_global_scale" if measured else "input_scale"] = fixed if measured else fixed.reshape(1).to(dtype)
    return tensors
