"""The blocks of GGUF: how codes, scales and minima of a matrix lie in bytes.

O = outputs, I = inputs, G = groups of inputs, B = blocks of a row, N = inputs of a block, C = bytes.

A row is cut into blocks of 32 (ternary: 256) inputs, each with its own scale; a group of more inputs is several blocks
with one scale. Nothing is rounded here but scales and minima, to float16; `error_in_steps` says how far that moves a
weight. The blocks of K-quants are super-blocks of 256 inputs, whose scales are integers already.

Source: ggml-quants.c and ggml-common.h of ggml; the `gguf` package decodes the same bytes (tests compare the two).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from llmcompress.formats.gguf_fields import (
    as_bytes,
    as_float16,
    high_bits,
    nibbles,
    pairs,
    trits,
    unnibbled,
    unpaired,
    untrits,
)
from llmcompress.formats.gguf_super_blocks import Fields, pack_super_blocks, unpack_super_blocks
from llmcompress.formats.named import Kind, Named, empty_codes
from llmcompress.modules.scheme import Scheme, named_scheme
from llmcompress.numerics.formats import E2M1, POWER_OF_TWO, scales_from_bytes, scales_to_bytes
from llmcompress.numerics.grid import Grid
from llmcompress.numerics.quantized import QuantizedTensor


@dataclass(frozen=True)
class BlockType:
    """One of ggml's tensor types that is made of integer fields (or E2M1 codes) and scales."""

    name: str
    """As ggml and the `gguf` package spell it."""
    bits: int
    """Of a field."""
    offset: int
    """Field = code + offset."""
    block: int = 32
    """Inputs that share a scale."""
    has_minimum: bool = False
    """Weight = field · scale + minimum; otherwise (field - offset) · scale."""
    stored: int | None = None
    """Bytes of a block, where they are not its fields and a float16 for its scale and its minimum."""

    @property
    def bytes(self) -> int:
        """Of a block."""
        if self.stored is not None:
            return self.stored
        scale = 1 if self is MXFP4 else 2
        return self.block * self.bits // 8 + scale * (2 if self.has_minimum else 1)

    @property
    def bits_per_weight(self) -> float:
        """With scales and minima."""
        return 8 * self.bytes / self.block


Q4_0 = BlockType("Q4_0", 4, 8)
Q4_1 = BlockType("Q4_1", 4, 8, has_minimum=True)
Q5_0 = BlockType("Q5_0", 5, 16)
Q5_1 = BlockType("Q5_1", 5, 16, has_minimum=True)
Q8_0 = BlockType("Q8_0", 8, 0)
TQ2_0 = BlockType("TQ2_0", 2, 1, block=256)
TQ1_0 = BlockType("TQ1_0", 2, 1, block=256, stored=54)
MXFP4 = BlockType("MXFP4", 4, 0)
Q2_K = BlockType("Q2_K", 2, 2, block=256, has_minimum=True, stored=84)
Q3_K = BlockType("Q3_K", 3, 4, block=256, stored=110)
Q4_K = BlockType("Q4_K", 4, 8, block=256, has_minimum=True, stored=144)
Q5_K = BlockType("Q5_K", 5, 16, block=256, has_minimum=True, stored=176)
Q6_K = BlockType("Q6_K", 6, 32, block=256, stored=210)

K_QUANTS = {named_scheme(each.name.lower()).weights: each for each in (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)}
"""Grids with super-blocks, and the types that they are made for."""
TERNARY = (TQ2_0, TQ1_0)
TYPES = (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, *TERNARY, MXFP4, *K_QUANTS.values())
_SYMMETRIC, _ASYMMETRIC = (Q4_0, Q5_0, Q8_0), (Q4_1, Q5_1)


@dataclass(frozen=True, eq=False)
class Blocks:
    """What the bytes of a matrix say."""

    type: BlockType
    codes: Tensor
    """O×I int8, in our convention: signed integers; of MXFP4 the places in the table of E2M1."""
    scale: Tensor
    """O×B, float16; of MXFP4 float32 powers of two; of K-quants O×G integers."""
    minimum: Tensor | None
    """O×B float16; of K-quants O×G integers, of what is subtracted."""
    shared: Tensor | None = None
    """What the integers of K-quants are multiplied by: O×B×1 float16, with minima O×B×2."""

    def dense(self) -> Tensor:
        """O×I float32, as every reader of GGUF computes it."""
        if self.shared is not None:
            return self._from_super_blocks(self.shared.float())
        scale_OI = self.scale.float().repeat_interleave(self.type.block, 1)
        if self.type is MXFP4:
            return E2M1.decode(self.codes, torch.float32) * scale_OI
        if self.minimum is None:
            return self.codes.float() * scale_OI
        fields_OI = self.codes.float() + self.type.offset
        return fields_OI * scale_OI + self.minimum.float().repeat_interleave(self.type.block, 1)

    def _from_super_blocks(self, shared_OBL: Tensor) -> Tensor:
        groups = self.scale.shape[1] // shared_OBL.shape[1]
        length = self.type.block // groups

        def each(integers_OG: Tensor, level: int) -> Tensor:
            value_OG = integers_OG.float() * shared_OBL[..., level].repeat_interleave(groups, 1)
            return value_OG.repeat_interleave(length, 1)

        if self.minimum is None:
            return self.codes.float() * each(self.scale, 0)
        return (self.codes.float() + self.type.offset) * each(self.scale, 0) - each(self.minimum, 1)


def block_type(grid: Grid, inputs: int, ternary: BlockType = TQ2_0) -> BlockType | None:
    """The narrowest type that holds every code of the grid; None if none does, or the groups are no whole blocks.

    Of the two types for -1, 0 and 1 it is the one asked for.
    """
    if grid.scales.super_block is not None:
        return K_QUANTS[grid] if inputs % grid.scales.super_block == 0 else None
    if grid == Grid.of(E2M1, MXFP4.block, POWER_OF_TWO):
        return MXFP4 if inputs % MXFP4.block == 0 else None
    if grid.number is not None or grid.scales.single:
        return None
    if grid.ternary and _fits(grid, inputs, ternary):
        return ternary
    types = _SYMMETRIC if grid.symmetric else _ASYMMETRIC
    return next((each for each in types if grid.bits <= each.bits and _fits(grid, inputs, each)), None)


def pack(tensor: QuantizedTensor, kind: BlockType) -> Tensor:
    """O×bytes uint8: the rows of a matrix whose grid `block_type` gave this type for."""
    outputs, inputs = tensor.shape
    fields_OBN = (tensor.codes.to(torch.int16) + kind.offset).to(torch.uint8).reshape(outputs, -1, kind.block)
    if tensor.grid.scales.super_block is not None:
        return _pack_super_blocks(tensor, fields_OBN, kind)
    if kind is MXFP4:
        scale_OB1 = scales_to_bytes(tensor.scale, POWER_OF_TWO)[..., None]
        return torch.cat([scale_OB1, nibbles(fields_OBN)], -1).flatten(1)
    scale_OB = _per_block(tensor.scale.to(torch.float16), tensor.grid, inputs, kind)
    if kind in TERNARY:
        packed_OBC = pairs(fields_OBN) if kind is TQ2_0 else trits(fields_OBN)
        return torch.cat([packed_OBC, as_bytes(scale_OB)], -1).flatten(1)
    parts = [as_bytes(scale_OB)]
    if kind.has_minimum:
        parts.append(as_bytes(_per_block(minima(tensor, kind).to(torch.float16), tensor.grid, inputs, kind)))
    if kind.bits == 5:
        parts.append(high_bits(fields_OBN))
    parts.append(fields_OBN if kind.bits == 8 else nibbles(fields_OBN & 15))
    return torch.cat(parts, -1).flatten(1)


def unpack(packed_OC: Tensor, kind: BlockType) -> Blocks:
    """What `pack` was given, with the scales that are in the file."""
    outputs = len(packed_OC)
    left_OBC = packed_OC.reshape(outputs, -1, kind.bytes)
    if kind is MXFP4:
        scale_OB = scales_from_bytes(left_OBC[..., 0], POWER_OF_TWO, torch.float32)
        return Blocks(kind, unnibbled(left_OBC[..., 1:]).to(torch.int8).flatten(1), scale_OB, None)
    if kind in TERNARY:
        fields_OBN = unpaired(left_OBC[..., :-2]) if kind is TQ2_0 else untrits(left_OBC[..., :-2])
        return Blocks(kind, fields_OBN.to(torch.int8).flatten(1) - kind.offset, as_float16(left_OBC[..., -2:]), None)
    if kind in K_QUANTS.values():
        return _unpacked_super_blocks(left_OBC, kind)
    scale_OB, left_OBC = as_float16(left_OBC[..., :2]), left_OBC[..., 2:]
    minimum_OB = None
    if kind.has_minimum:
        minimum_OB, left_OBC = as_float16(left_OBC[..., :2]), left_OBC[..., 2:]
    if kind.bits == 8:
        return Blocks(kind, left_OBC.contiguous().view(torch.int8).flatten(1), scale_OB, minimum_OB)
    fields_OBN = unnibbled(left_OBC[..., 4:] if kind.bits == 5 else left_OBC)
    if kind.bits == 5:
        places = torch.arange(8, dtype=torch.uint8)
        fields_OBN = fields_OBN | ((left_OBC[..., :4, None] >> places & 1).flatten(-2) << 4)
    return Blocks(kind, (fields_OBN.to(torch.int16) - kind.offset).to(torch.int8).flatten(1), scale_OB, minimum_OB)


def minima(tensor: QuantizedTensor, kind: BlockType) -> Tensor:
    """O×G float32: the weight whose field is 0, -(zero + offset) · scale."""
    assert tensor.zero_point is not None
    return -(tensor.zero_point.float() + kind.offset) * tensor.scale.float()


def differing(found: Blocks, tensor: QuantizedTensor) -> tuple[int, int]:
    """How many codes, and how many scales and minima of blocks, are not bit for bit those of the matrix."""
    again = unpack(pack(tensor, found.type), found.type)
    codes = int((found.codes != tensor.codes).sum())
    scales = int((found.scale != again.scale).sum())
    for one, other in ((found.minimum, again.minimum), (found.shared, again.shared)):
        if one is not None and other is not None:
            scales += int((one != other).sum())
    return codes, scales


def error_in_steps(tensor: QuantizedTensor, kind: BlockType) -> float:
    """How far float16 scales and minima move any weight, in steps of its grid; 0: they are exact."""
    if kind is MXFP4 or tensor.grid.scales.super_block is not None:
        return 0.0
    scale_OG = tensor.scale.float()
    moved_OG = (scale_OG.to(torch.float16).float() - scale_OG).abs()
    low = tensor.grid.low + (kind.offset if kind.has_minimum else 0)
    high = tensor.grid.high + (kind.offset if kind.has_minimum else 0)
    total_OG = moved_OG * max(abs(low), high)
    if kind.has_minimum:
        minimum_OG = minima(tensor, kind)
        total_OG = total_OG + (minimum_OG.to(torch.float16).float() - minimum_OG).abs()
    steps_OG = torch.where(scale_OG == 0, torch.zeros_like(total_OG), total_OG / scale_OG.abs())
    return float(steps_OG.max()) if steps_OG.numel() else 0.0


@cache
def tensors(shape: tuple[int, int], scheme: Scheme, kind: BlockType, *, bias: bool) -> dict[str, Kind]:
    """Names, dtypes and shapes of a linear of that shape (O, I) in the file; a bias is float32."""
    packed: Named = {"weight": pack(empty_codes(shape, scheme, torch.float16, bias=False).tensor, kind)}
    found: dict[str, Kind] = {name: (each.dtype, tuple(each.shape)) for name, each in packed.items()}
    return {**found, "bias": (torch.float32, (shape[0],))} if bias else found


def _pack_super_blocks(tensor: QuantizedTensor, fields_OBN: Tensor, kind: BlockType) -> Tensor:
    assert tensor.shared_scale is not None
    shape = (*fields_OBN.shape[:2], -1)
    minimum = None if tensor.zero_point is None else tensor.zero_point.reshape(shape)
    fields = Fields(fields_OBN, tensor.scale.reshape(shape), minimum, tensor.shared_scale.to(torch.float16))
    return pack_super_blocks(fields, kind.name).flatten(1)


def _unpacked_super_blocks(packed_OBC: Tensor, kind: BlockType) -> Blocks:
    fields = unpack_super_blocks(packed_OBC, kind.name)
    codes_OI = (fields.codes_OSN.to(torch.int16) - kind.offset).to(torch.int8).flatten(1)
    minimum = None if fields.minimum_OSK is None else fields.minimum_OSK.to(torch.int8).flatten(1)
    return Blocks(kind, codes_OI, fields.scale_OSK.to(torch.int16).flatten(1), minimum, fields.shared_OSL)


def _fits(grid: Grid, inputs: int, kind: BlockType) -> bool:
    """Whether every group is a whole number of blocks; the last one may be shorter by whole blocks."""
    return inputs % kind.block == 0 and (grid.group is None or grid.group % kind.block == 0 or grid.group >= inputs)


def _per_block(value_OG: Tensor, grid: Grid, inputs: int, kind: BlockType) -> Tensor:
    blocks = inputs // kind.block
    each = blocks if grid.group is None else -(-grid.group // kind.block)
    return value_OG.repeat_interleave(each, 1)[:, :blocks]
