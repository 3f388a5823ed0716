"""Small integers as a stream of bits: a row of 3-bit codes takes three bits a code. O = rows, I = codes, B = bytes."""

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
    places = torch.arange(bits, dtype=torch.int16, device=codes_OI.device)
    stream = ((codes_OI.to(torch.int16) - low)[..., None] >> places & 1).to(torch.uint8).reshape(rows, count * bits)
    length = packed_bytes(count, bits) * 8
    stream = torch.nn.functional.pad(stream, (0, length - count * bits)).reshape(rows, length // 8, 8)
    weights = (2 ** torch.arange(8, device=codes_OI.device)).to(torch.uint8)
    return (stream * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed_OB: Tensor, bits: int, low: int, count: int) -> Tensor:
    """The int8 codes of which `packed_OB` is the packed form, `count` a row."""
    rows = len(packed_OB)
    places = torch.arange(8, dtype=torch.uint8, device=packed_OB.device)
    stream = (packed_OB[..., None] >> places & 1).reshape(rows, -1)[:, : count * bits].reshape(rows, count, bits)
    weights = (2 ** torch.arange(bits, device=packed_OB.device)).to(torch.int16)
    return ((stream.to(torch.int16) * weights).sum(-1, dtype=torch.int16) + low).to(torch.int8)
