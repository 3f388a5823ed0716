"""How codes, scales and zero points lie in the operators MatMulNBits and GatherBlockQuantized of ONNX Runtime.

O = outputs, I = inputs, G = groups of inputs, B = blocks of a row, N = inputs of a block, C = bytes.

A row is cut into blocks with one scale each; a group of more inputs is several blocks with the same scale. Nothing is
rounded: scales become float32, in which those of every 16-bit checkpoint are exact.

Source: docs/ContribOperators.md of ONNX Runtime, com.microsoft.MatMulNBits and GatherBlockQuantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from llmcompress.formats.named import Kind, empty_codes
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.grid import Grid
from llmcompress.numerics.packing import pack_bits
from llmcompress.numerics.quantized import QuantizedTensor

WIDTHS = (2, 4, 8)
"""Bits of a field that MatMulNBits has kernels for."""
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256
"""Blocks are powers of two; two-bit fields have none above."""
_WHOLE_ROW = 128
"""Block of a row with one scale, where no power of two of at least half of it divides the row."""


@dataclass(frozen=True)
class NBits:
    """Field = code + `offset`, without zero points; with them both have the offset."""

    bits: int
    block: int

    @property
    def offset(self) -> int:
        """The field of code 0, which the operators take for granted."""
        return 1 << (self.bits - 1)

    @property
    def bytes(self) -> int:
        """Of a block."""
        return self.block * self.bits // 8

    def blocks(self, inputs: int) -> int:
        """Of a row."""
        return -(-inputs // self.block)


@dataclass(frozen=True, eq=False)
class Fields:
    """What is in the file of one matrix."""

    codes: Tensor
    """O×B×C uint8: lowest bits first; a ragged last block is filled with fields that mean zero."""
    scale: Tensor
    """O×B float32."""
    zero: Tensor | None
    """O×C uint8, packed along the blocks of a row; None: `offset` everywhere."""


def layout(grid: Grid, inputs: int, *, looks_up: bool = False) -> NBits | None:
    """The narrowest fields that hold every code, and the longest block; None where the operators have no such form.

    `looks_up`: rows are looked up too, as those of an embedding, which takes 4 or 8 bits, blocks that divide the row,
    and zero points of a byte.
    """
    if grid.number is not None or grid.scales.single:
        return None
    group = grid.group if grid.group is not None and grid.group < inputs else None
    block = _block(group, inputs, divides=looks_up)
    widths = WIDTHS[1:] if looks_up else WIDTHS
    bits = 8 if looks_up and not grid.symmetric else next(each for each in widths if grid.bits <= each)
    return None if block is None else NBits(bits, block)


def multiplies_integers(scheme: Scheme, inputs: int) -> bool:
    """Whether products of integers compute it as the scheme says: one scale for a token, and one for each output."""
    grid = scheme.weights
    whole_rows = grid.groups(inputs) == 1 and not grid.scales.single
    return scheme.activations in ("token", "tensor") and grid.number is None and grid.symmetric and whole_rows


def pack(tensor: QuantizedTensor, kind: NBits) -> Fields:
    """The fields of a matrix for whose grid `layout` gave this kind."""
    return Fields(packed_codes(tensor, kind), block_scales(tensor, kind), packed_zeros(tensor, kind))


def packed_codes(tensor: QuantizedTensor, kind: NBits) -> Tensor:
    """O×B×C uint8."""
    (outputs, inputs), blocks, codes_OI = tensor.shape, kind.blocks(tensor.shape[1]), tensor.codes
    missing = blocks * kind.block - inputs
    if missing:
        zero_OG = torch.zeros_like(codes_OI[:, :1]) if tensor.zero_point is None else tensor.zero_point
        codes_OI = torch.cat([codes_OI, zero_OG[:, -1:].expand(-1, missing)], 1)
    return pack_bits(codes_OI, kind.bits, -kind.offset).reshape(outputs, blocks, kind.bytes)


def block_scales(tensor: QuantizedTensor, kind: NBits) -> Tensor:
    """O×B float32."""
    return _per_block(tensor.scale.float(), tensor.grid, tensor.shape[1], kind).contiguous()


def packed_zeros(tensor: QuantizedTensor, kind: NBits) -> Tensor | None:
    """O×C uint8."""
    if tensor.zero_point is None:
        return None
    return pack_bits(_per_block(tensor.zero_point, tensor.grid, tensor.shape[1], kind), kind.bits, -kind.offset)


def unpack(fields: Fields, kind: NBits, inputs: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes O×I and, of every block, scales and zero points, all as we count: signed."""
    codes_OI = _signed(fields.codes.flatten(1), kind)[:, :inputs]
    zero_OB = None if fields.zero is None else _signed(fields.zero, kind)[:, : kind.blocks(inputs)]
    return codes_OI, fields.scale, zero_OB


def dense(fields: Fields, kind: NBits, inputs: int) -> Tensor:
    """O×I float32, as the operators compute it."""
    codes_OI, scale_OB, zero_OB = unpack(fields, kind, inputs)
    centred_OI = codes_OI.float()
    if zero_OB is not None:
        centred_OI = centred_OI - zero_OB.float().repeat_interleave(kind.block, 1)[:, :inputs]
    return centred_OI * scale_OB.repeat_interleave(kind.block, 1)[:, :inputs]


def differing(fields: Fields, kind: NBits, tensor: QuantizedTensor) -> tuple[int, int]:
    """How many codes, and how many scales and zero points of blocks, are not bit for bit those of the matrix."""
    inputs = tensor.shape[1]
    codes_OI, scale_OB, zero_OB = unpack(fields, kind, inputs)
    scales = int((scale_OB != _per_block(tensor.scale.float(), tensor.grid, inputs, kind)).sum())
    if (zero_OB is None) != (tensor.zero_point is None):
        scales += scale_OB.numel()
    elif zero_OB is not None and tensor.zero_point is not None:
        scales += int((zero_OB != _per_block(tensor.zero_point, tensor.grid, inputs, kind)).sum())
    return int((codes_OI != tensor.codes).sum()), scales


@cache
def tensors(shape: tuple[int, int], scheme: Scheme, kind: NBits | None, *, bias: bool) -> dict[str, Kind]:
    """Names, dtypes and shapes of a linear of that shape (O, I) in the file; a bias is float32. `kind` None: int8 as
    it is, for MatMulIntegerToFloat.
    """
    if kind is None:
        whole: dict[str, Kind] = {"codes": (torch.int8, shape[::-1]), "scales": (torch.float32, shape[:1])}
        return {**whole, "bias": (torch.float32, shape[:1])} if bias else whole
    fields = pack(empty_codes(shape, scheme, torch.float32, bias=False).tensor, kind)
    held = {"codes": fields.codes, "scales": fields.scale, "zeros": fields.zero}
    found: dict[str, Kind] = {name: (each.dtype, tuple(each.shape)) for name, each in held.items() if each is not None}
    return {**found, "bias": (torch.float32, (shape[0],))} if bias else found


def _block(group: int | None, inputs: int, *, divides: bool) -> int | None:
    """The longest power of two that divides the group, and where asked the row; None: shorter than any block."""
    if group is None:
        block = min(inputs & -inputs, LARGEST_BLOCK)
        block = block if divides or block >= _WHOLE_ROW // 2 else _WHOLE_ROW
    else:
        block = min(group & -group, LARGEST_BLOCK)
        block = min(block, inputs & -inputs) if divides else block
    return block if block >= SMALLEST_BLOCK else None


def _per_block(value_OG: Tensor, grid: Grid, inputs: int, kind: NBits) -> Tensor:
    """O×B."""
    blocks = kind.blocks(inputs)
    each = blocks if grid.group is None else -(-min(grid.group, inputs) // kind.block)
    return value_OG.repeat_interleave(each, 1)[:, :blocks]


def _signed(packed_OC: Tensor, kind: NBits) -> Tensor:
    """The int8 numbers of rows of fields; those that only fill the last byte are among them."""
    places = torch.arange(0, 8, kind.bits, dtype=torch.uint8, device=packed_OC.device)
    fields_OCE = packed_OC[..., None] >> places & ((1 << kind.bits) - 1)
    if kind.bits == 8:  # 0…255 less 128 is the same byte with its highest bit changed
        return (fields_OCE.flatten(1) ^ 128).view(torch.int8)
    return fields_OCE.flatten(1).to(torch.int8) - kind.offset
