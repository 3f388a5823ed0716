"""The blocks of GGUF: how codes, scales and minima of a matrix lie in bytes.

O = outputs, I = inputs, G = groups of inputs, B = blocks of a row, N = inputs of a block, C = bytes.

A row is cut into blocks of 32 (ternary: 256) inputs, each with its own scale; a group of more inputs is several blocks
with one scale. Nothing is rounded here but scales and minima, to float16; `error_in_steps` says how far that moves a
weight.

Source: ggml-quants.c and ggml-common.h of ggml; the `gguf` package decodes the same bytes (tests compare the two).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from llmcompress.formats.named import Kind, Named, empty_codes
from llmcompress.modules.scheme import Scheme
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

    @property
    def bytes(self) -> int:
        """Of a block."""
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
MXFP4 = BlockType("MXFP4", 4, 0)

TYPES = (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ2_0, MXFP4)
_SYMMETRIC, _ASYMMETRIC = (Q4_0, Q5_0, Q8_0), (Q4_1, Q5_1)


@dataclass(frozen=True, eq=False)
class Blocks:
    """What the bytes of a matrix say."""

    type: BlockType
    codes: Tensor
    """O×I int8, in our convention: signed integers; of MXFP4 the places in the table of E2M1."""
    scale: Tensor
    """O×B, float16; of MXFP4 float32 powers of two."""
    minimum: Tensor | None
    """O×B float16."""

    def dense(self) -> Tensor:
        """O×I float32, as every reader of GGUF computes it."""
        scale_OI = self.scale.float().repeat_interleave(self.type.block, 1)
        if self.type is MXFP4:
            return E2M1.decode(self.codes, torch.float32) * scale_OI
        if self.minimum is None:
            return self.codes.float() * scale_OI
        fields_OI = self.codes.float() + self.type.offset
        return fields_OI * scale_OI + self.minimum.float().repeat_interleave(self.type.block, 1)


def block_type(grid: Grid, inputs: int) -> BlockType | None:
    """The narrowest type that holds every code of the grid; None if none does, or the groups are no whole blocks."""
    if grid == Grid.of(E2M1, MXFP4.block, POWER_OF_TWO):
        return MXFP4 if inputs % MXFP4.block == 0 else None
    if grid.number is not None or grid.scales.single:
        return None
    if grid.ternary and _fits(grid, inputs, TQ2_0):
        return TQ2_0
    types = _SYMMETRIC if grid.symmetric else _ASYMMETRIC
    return next((each for each in types if grid.bits <= each.bits and _fits(grid, inputs, each)), None)


def pack(tensor: QuantizedTensor, kind: BlockType) -> Tensor:
    """O×bytes uint8: the rows of a matrix whose grid `block_type` gave this type for."""
    outputs, inputs = tensor.shape
    fields_OBN = (tensor.codes.to(torch.int16) + kind.offset).to(torch.uint8).reshape(outputs, -1, kind.block)
    if kind is MXFP4:
        scale_OB1 = scales_to_bytes(tensor.scale, POWER_OF_TWO)[..., None]
        return torch.cat([scale_OB1, _nibbles(fields_OBN)], -1).flatten(1)
    scale_OB = _per_block(tensor.scale.to(torch.float16), tensor.grid, inputs, kind)
    if kind is TQ2_0:
        return torch.cat([_pairs(fields_OBN), _bytes(scale_OB)], -1).flatten(1)
    parts = [_bytes(scale_OB)]
    if kind.has_minimum:
        parts.append(_bytes(_per_block(minima(tensor, kind).to(torch.float16), tensor.grid, inputs, kind)))
    if kind.bits == 5:
        parts.append(_high_bits(fields_OBN))
    parts.append(fields_OBN if kind.bits == 8 else _nibbles(fields_OBN & 15))
    return torch.cat(parts, -1).flatten(1)


def unpack(packed_OC: Tensor, kind: BlockType) -> Blocks:
    """What `pack` was given, with the scales that are in the file."""
    outputs = len(packed_OC)
    left_OBC = packed_OC.reshape(outputs, -1, kind.bytes)
    if kind is MXFP4:
        scale_OB = scales_from_bytes(left_OBC[..., 0], POWER_OF_TWO, torch.float32)
        return Blocks(kind, _unnibbled(left_OBC[..., 1:]).to(torch.int8).flatten(1), scale_OB, None)
    if kind is TQ2_0:
        codes_OI = _unpaired(left_OBC[..., :-2]).to(torch.int8).flatten(1) - kind.offset
        return Blocks(kind, codes_OI, _floats(left_OBC[..., -2:]), None)
    scale_OB, left_OBC = _floats(left_OBC[..., :2]), left_OBC[..., 2:]
    minimum_OB = None
    if kind.has_minimum:
        minimum_OB, left_OBC = _floats(left_OBC[..., :2]), left_OBC[..., 2:]
    if kind.bits == 8:
        return Blocks(kind, left_OBC.contiguous().view(torch.int8).flatten(1), scale_OB, minimum_OB)
    fields_OBN = _unnibbled(left_OBC[..., 4:] if kind.bits == 5 else left_OBC)
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
    if found.minimum is not None and again.minimum is not None:
        scales += int((found.minimum != again.minimum).sum())
    return codes, scales


def error_in_steps(tensor: QuantizedTensor, kind: BlockType) -> float:
    """How far float16 scales and minima move any weight, in steps of its grid; 0: they are exact."""
    if kind is MXFP4:
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


def _fits(grid: Grid, inputs: int, kind: BlockType) -> bool:
    """Whether every group is a whole number of blocks; the last one may be shorter by whole blocks."""
    return inputs % kind.block == 0 and (grid.group is None or grid.group % kind.block == 0 or grid.group >= inputs)


def _per_block(value_OG: Tensor, grid: Grid, inputs: int, kind: BlockType) -> Tensor:
    blocks = inputs // kind.block
    each = blocks if grid.group is None else -(-grid.group // kind.block)
    return value_OG.repeat_interleave(each, 1)[:, :blocks]


def _nibbles(fields_OBN: Tensor) -> Tensor:
    """The first half of a block in the low, the second half in the high four bits."""
    low_OBH, high_OBH = fields_OBN.chunk(2, -1)
    return low_OBH | high_OBH << 4


def _unnibbled(packed_OBH: Tensor) -> Tensor:
    return torch.cat([packed_OBH & 15, packed_OBH >> 4], -1)


def _high_bits(fields_OBN: Tensor) -> Tensor:
    """Bit 4 of the 32 fields of a block, as a little-endian word."""
    weights = 2 ** torch.arange(8, device=fields_OBN.device)
    bits = (fields_OBN >> 4).reshape(*fields_OBN.shape[:-1], 4, 8) * weights
    packed_OB4: Tensor = bits.sum(-1).to(torch.uint8)
    return packed_OB4


def _pairs(fields_OBN: Tensor) -> Tensor:
    """Two bits each: of every 128 fields, those 32 apart share a byte."""
    four = fields_OBN.reshape(*fields_OBN.shape[:-1], -1, 4, 32)
    packed = four[..., 0, :] | four[..., 1, :] << 2 | four[..., 2, :] << 4 | four[..., 3, :] << 6
    return packed.flatten(-2)


def _unpaired(packed_OBC: Tensor) -> Tensor:
    halves = packed_OBC.reshape(*packed_OBC.shape[:-1], -1, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed_OBC.device)[:, None]
    fields_OBN: Tensor = (halves >> shifts & 3).flatten(-3)
    return fields_OBN


def _bytes(value_OB: Tensor) -> Tensor:
    return value_OB.contiguous()[..., None].view(torch.uint8)


def _floats(bytes_OB2: Tensor) -> Tensor:
    return bytes_OB2.contiguous().view(torch.float16).squeeze(-1)
