"""Packs small integers into a bit stream: a row of 3-bit codes takes three bits per code. O = rows, I = codes, B =
bytes.

Ternary codes are packed five to a byte, as base-3 digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

TRITS_IN_BYTE = 5
"""3⁵ = 243: 1.6 bits per code; log₂ 3 = 1.585 would be the minimum."""


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


def packed_trit_bytes(count: int) -> int:
    """Bytes that `count` ternary codes of one row take."""
    return -(-count // TRITS_IN_BYTE)


def pack_trits(codes_OI: Tensor) -> Tensor:
    """O×B uint8: codes of -1, 0 and 1 plus one as digits to the base 3, the first one the lowest; rows end in zeros."""
    rows, count = codes_OI.shape
    missing = packed_trit_bytes(count) * TRITS_IN_BYTE - count
    digits_OI = torch.nn.functional.pad((codes_OI + 1).to(torch.uint8), (0, missing))
    digits_OB5 = digits_OI.reshape(rows, packed_trit_bytes(count), TRITS_IN_BYTE)
    return (digits_OB5 * _powers_of_three(codes_OI.device)).sum(-1, dtype=torch.uint8)


def unpack_trits(packed_OB: Tensor, count: int) -> Tensor:
    """The int8 codes of which `packed_OB` is the packed form, `count` a row."""
    powers = _powers_of_three(packed_OB.device)
    digits_OB5 = packed_OB[..., None].div(powers, rounding_mode="floor") % 3
    return digits_OB5.flatten(1)[:, :count].to(torch.int8) - 1


def _powers_of_three(device: torch.device) -> Tensor:
    return (3 ** torch.arange(TRITS_IN_BYTE, device=device)).to(torch.uint8)
