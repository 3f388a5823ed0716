"""The constants of OpenVINO's IR that hold a quantized matrix: codes, scales and zero points, as it packs them.

O = outputs, I = inputs, G = groups of inputs, N = inputs of a group.

A weight is (code - zero point) · scale: of a row that is one group O×I codes and O×1 scales, otherwise O×G×N and O×G×1.
Numbers of four bits are packed over the whole constant, the first one in the low half of a byte. Nothing is rounded.

Source: openvino/core/type/element_type.hpp and element_iterator.hpp of OpenVINO; tests let the package decode it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor

from llmcompress.formats.named import Kind, empty_codes
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.formats import (
    E2M1,
    E4M3,
    E5M2,
    NF4,
    POWER_OF_TWO,
    SINGLE,
    STORED,
    TWO_LEVEL,
    NumberFormat,
    ScaleKind,
    scales_from_bytes,
    scales_to_bytes,
)
from llmcompress.numerics.grid import Grid
from llmcompress.numerics.quantized import QuantizedTensor


@dataclass(frozen=True)
class ElementType:
    """One of OpenVINO's types that holds codes."""

    name: str
    """As the IR spells it."""
    bits: int
    offset: int = 0
    """Field = code + offset."""

    @property
    def is_signed(self) -> bool:
        """Of an integer type."""
        return self.offset == 0


I4, U4 = ElementType("i4", 4), ElementType("u4", 4, 8)
I8, U8 = ElementType("i8", 8), ElementType("u8", 8, 128)
_FLOATS: Mapping[NumberFormat, ElementType] = {
    E4M3: ElementType("f8e4m3", 8),
    E5M2: ElementType("f8e5m2", 8),
    E2M1: ElementType("f4e2m1", 4),
    NF4: ElementType("nf4", 4),
}
EXPANDED = frozenset({_FLOATS[E4M3].name, _FLOATS[E5M2].name})
"""Types that OpenVINO's plug-in for CPUs turns into bfloat16 or float32 while it compiles a model."""
_EXPONENTS = "f8e8m0"
_FLOAT_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
DENSE = {dtype: name for name, dtype in _FLOAT_TYPES.items()}
"""What ordinary weights are stored as."""


@dataclass(frozen=True, eq=False)
class Constant:
    """One constant of the IR."""

    type: str
    """As the IR spells it."""
    shape: tuple[int, ...]
    data: Tensor
    """Its bytes, uint8, flat."""


@dataclass(frozen=True, eq=False)
class Packed:
    """The constants of a matrix."""

    codes: Constant
    scale: Constant
    zero_point: Constant | None

    @property
    def present(self) -> dict[str, Constant]:
        """By name, without what is not there."""
        found = {"codes": self.codes, "scale": self.scale, "zero_point": self.zero_point}
        return {name: constant for name, constant in found.items() if constant is not None}


def element_type(grid: Grid) -> ElementType:
    """The narrowest type that OpenVINO keeps compressed and that holds every code of the grid.

    Its types of two and three bits are none: its CPU plug-in fails on u2 while it quantizes activations (2026.4).
    """
    if grid.number is not None:
        return _FLOATS[grid.number]
    if grid.symmetric:
        return I4 if grid.bits <= I4.bits else I8
    return U4 if grid.bits <= U4.bits else U8


def fits(grid: Grid, inputs: int) -> bool:
    """Whether the groups of a row are equally long, and have a number each as their scale."""
    return grid.scales.super_block is None and (grid.groups(inputs) == 1 or inputs % grid.length(inputs) == 0)


def pack(tensor: QuantizedTensor) -> Packed:
    """The constants of a matrix that `fits`."""
    grid, kind = tensor.grid, element_type(tensor.grid)
    outputs, inputs = tensor.shape
    groups = grid.groups(inputs)
    per_group = (groups, 1) if groups > 1 else (1,)
    codes = _constant(kind.name, (outputs, groups, inputs // groups) if groups > 1 else tensor.shape, tensor.codes)
    rows = 1 if grid.scales.single else outputs
    zero_point = tensor.zero_point
    return Packed(
        codes if kind.is_signed else _fields(kind, codes.shape, tensor.codes),
        _scales(tensor, (rows, *per_group)),
        None if zero_point is None else _fields(kind, (rows, *per_group), zero_point),
    )


def unpack(packed: Packed, grid: Grid) -> QuantizedTensor:
    """Codes and zero points that `pack` was given, and its scales in float32, those of two levels as products."""
    kind = element_type(grid)
    assert packed.codes.type == kind.name, f"{packed.codes.type} holds no codes of {kind.name}"
    outputs = packed.codes.shape[0]
    codes_OI = (unpacked(packed.codes) - kind.offset).to(torch.int8).reshape(outputs, -1)
    zero_OG = None
    if packed.zero_point is not None:
        zero_OG = (unpacked(packed.zero_point) - kind.offset).to(torch.int8).reshape(packed.zero_point.shape[0], -1)
    scale_OG = values(packed.scale).reshape(packed.scale.shape[0], -1)
    return QuantizedTensor(codes_OI, scale_OG, zero_OG, None, _without_levels(grid))


def plain_scales(tensor: QuantizedTensor) -> Tensor:
    """The scales in float32 as one number for each group, those of two levels as products."""
    return tensor.fitted.scale_OG.float()


def dense(weight: Tensor) -> Constant:
    """Ordinary weights, as they are."""
    return Constant(DENSE[weight.dtype], tuple(weight.shape), _bytes(weight))


def values(constant: Constant) -> Tensor:
    """Its numbers as float32, in its shape."""
    if constant.type in _FLOAT_TYPES:
        return constant.data.contiguous().view(_FLOAT_TYPES[constant.type]).reshape(constant.shape).float()
    if constant.type == _EXPONENTS:
        return scales_from_bytes(constant.data, POWER_OF_TWO, torch.float32).reshape(constant.shape)
    for number, kind in _FLOATS.items():
        if kind.name == constant.type:
            return number.decode(unpacked(constant).to(torch.int8), torch.float32).reshape(constant.shape)
    return unpacked(constant).float().reshape(constant.shape)


def unpacked(constant: Constant) -> Tensor:
    """The fields of a type of four or eight bits, int16, in its shape."""
    count = prod(constant.shape)
    if constant.type in (I8.name, *EXPANDED):
        return constant.data.view(torch.int8).to(torch.int16).reshape(constant.shape)
    if constant.type == U8.name:
        return constant.data.to(torch.int16).reshape(constant.shape)
    fields = torch.stack([constant.data & 15, constant.data >> 4], 1).flatten()[:count].to(torch.int16)
    if constant.type == I4.name:
        fields = torch.where(fields > 7, fields - 16, fields)
    return fields.reshape(constant.shape)


@cache
def tensors(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype, *, bias: bool) -> dict[str, Kind]:
    """Names and bytes of a linear of that shape (O, I) whose scales have that dtype; a bias is float32."""
    packed = pack(empty_codes(shape, scheme, dtype, bias=False).tensor)
    found: dict[str, Kind] = {name: (torch.uint8, tuple(each.data.shape)) for name, each in packed.present.items()}
    return {**found, "bias": (torch.float32, (shape[0],))} if bias else found


def _without_levels(grid: Grid) -> Grid:
    plain: ScaleKind = SINGLE if grid.scales.single else STORED
    return Grid(grid.bits, grid.symmetric, grid.group, grid.number, plain, grid.positive_scales, grid.ternary)


def _scales(tensor: QuantizedTensor, shape: tuple[int, ...]) -> Constant:
    """In the first of these types that holds them exactly: exponents, float16, bfloat16, float32."""
    if tensor.grid.scales == POWER_OF_TWO:
        return Constant(_EXPONENTS, shape, scales_to_bytes(tensor.scale, POWER_OF_TWO).flatten())
    if tensor.scale.is_meta:  # a plan takes scales of 16 bits for what they mostly are
        kind = torch.bfloat16 if tensor.grid.scales == TWO_LEVEL else tensor.scale.dtype
        return Constant(DENSE[kind], shape, torch.empty(prod(shape) * kind.itemsize, dtype=torch.uint8, device="meta"))
    scale_OG = plain_scales(tensor)
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    exact = next(each for each in kinds if torch.equal(scale_OG.to(each).float(), scale_OG))
    return Constant(DENSE[exact], shape, _bytes(scale_OG.to(exact)))


def _fields(kind: ElementType, shape: tuple[int, ...], codes: Tensor) -> Constant:
    return _constant(kind.name, shape, codes.to(torch.int16) + kind.offset)


def _constant(name: str, shape: tuple[int, ...], fields: Tensor) -> Constant:
    flat = (fields.to(torch.int16) & 255).to(torch.uint8).flatten()
    if name in (I8.name, U8.name, *EXPANDED):
        return Constant(name, shape, flat)
    pairs = torch.nn.functional.pad(flat & 15, (0, flat.numel() % 2)).view(-1, 2)
    return Constant(name, shape, pairs[:, 0] | pairs[:, 1] << 4)


def _bytes(value: Tensor) -> Tensor:
    return value.detach().contiguous().flatten().view(torch.uint8)
