"""Packs small integers into a bit stream: a row of 3-bit codes takes three bits per code. O = rows, I = codes, B =
bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of one row take."""
    return -(-count * bits // 8)


def pack_bits(codes_OI: Tensor, bits: int, low: int) -> Tensor:
    """O×B uint8: code minus `low`, lowest bit first, rows padded to whole bytes.

    Codes must lie in `low` … `low + 2**bits - 1`.
    """
    rows, count = codes_OI.shape
    if 8 % bits == 0:
        return _pack_whole(codes_OI, bits, low)
    places = torch.arange(bits, dtype=torch.int16, device=codes_OI.device)
    stream = ((codes_OI.to(torch.int16) - low)[..., None] >> places & 1).to(torch.uint8).reshape(rows, count * bits)
    length = packed_bytes(count, bits) * 8
    stream = torch.nn.functional.pad(stream, (0, length - count * bits)).reshape(rows, length // 8, 8)
    weights = (2 ** torch.arange(8, device=codes_OI.device)).to(torch.uint8)
    return (stream * weights).sum(-1, dtype=torch.uint8)


def _pack_whole(codes_OI: Tensor, bits: int, low: int) -> Tensor:
    """The same where a byte holds whole codes: without a stream of single bits, which takes eight times the room."""
    rows, count, each = *codes_OI.shape, 8 // bits
    fields_OI = (codes_OI.to(torch.int16) - low).to(torch.uint8)
    fields_OBE = torch.nn.functional.pad(fields_OI, (0, -count % each)).reshape(rows, packed_bytes(count, bits), each)
    packed_OB = fields_OBE[..., 0].contiguous()
    for place in range(1, each):
        packed_OB = packed_OB | (fields_OBE[..., place] << (bits * place))
    return packed_OB


def pack_words(codes_OI: Tensor, bits: int) -> Tensor:
    """O×W int32: rows of signed codes as bits, padded to whole words. The same stream as `pack_bits`, which see."""
    packed_OB = pack_bits(codes_OI, bits, -(1 << (bits - 1)))
    return torch.nn.functional.pad(packed_OB, (0, -packed_OB.shape[1] % 4)).contiguous().view(torch.int32)


def unpack_words(words_OW: Tensor, bits: int, count: int) -> Tensor:
    """The int8 codes of which `words_OW` is the packed form, `count` a row."""
    return unpack_bits(words_OW.contiguous().view(torch.uint8), bits, -(1 << (bits - 1)), count)


def unpack_bits(packed_OB: Tensor, bits: int, low: int, count: int) -> Tensor:
    """The int8 codes of which `packed_OB` is the packed form, `count` a row."""
    rows = len(packed_OB)
    places = torch.arange(8, dtype=torch.uint8, device=packed_OB.device)
    stream = (packed_OB[..., None] >> places & 1).reshape(rows, -1)[:, : count * bits].reshape(rows, count, bits)
    weights = (2 ** torch.arange(bits, device=packed_OB.device)).to(torch.int16)
    return ((stream.to(torch.int16) * weights).sum(-1, dtype=torch.int16) + low).to(torch.int8)
