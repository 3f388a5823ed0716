"""How GGUF puts fields of fewer than eight bits, and float16 numbers, into bytes. B = blocks, N = fields of one."""

from __future__ import annotations

import torch
from torch import Tensor


def divided(values: Tensor, parts: int, length: int) -> Tensor:
    """The last axis as two."""
    return values.reshape(*values.shape[:-1], parts, length)


def nibbles(fields_BN: Tensor) -> Tensor:
    """The first half of a block in the low, the second half in the high four bits."""
    low_BH, high_BH = fields_BN.chunk(2, -1)
    return low_BH | high_BH << 4


def unnibbled(packed_BH: Tensor) -> Tensor:
    """What `nibbles` was given."""
    return torch.cat([packed_BH & 15, packed_BH >> 4], -1)


def high_bits(fields_BN: Tensor) -> Tensor:
    """Bit 4 of the 32 fields of a block, as a little-endian word."""
    weights = 2 ** torch.arange(8, device=fields_BN.device)
    bits = (fields_BN >> 4).reshape(*fields_BN.shape[:-1], 4, 8) * weights
    packed_B4: Tensor = bits.sum(-1).to(torch.uint8)
    return packed_B4


def pairs(fields_BN: Tensor) -> Tensor:
    """Two bits each: of every 128 fields, those 32 apart share a byte."""
    four = fields_BN.reshape(*fields_BN.shape[:-1], -1, 4, 32)
    packed = four[..., 0, :] | four[..., 1, :] << 2 | four[..., 2, :] << 4 | four[..., 3, :] << 6
    return packed.flatten(-2)


def unpaired(packed_BC: Tensor) -> Tensor:
    """What `pairs` was given."""
    halves = packed_BC.reshape(*packed_BC.shape[:-1], -1, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed_BC.device)[:, None]
    fields_BN: Tensor = (halves >> shifts & 3).flatten(-3)
    return fields_BN


def single_bits(fields_BN: Tensor) -> Tensor:
    """One bit each: of 256 fields, those 32 apart share a byte."""
    eight = divided(fields_BN, 8, 32)
    packed: Tensor = eight[..., 0, :]
    for place in range(1, 8):
        packed = packed | eight[..., place, :] << place
    return packed


def unsingle(packed_BC: Tensor) -> Tensor:
    """What `single_bits` was given."""
    return torch.cat([packed_BC >> place & 1 for place in range(8)], -1)


_TRITS = 5
_POWERS = (81, 27, 9, 3, 1)


def trits(fields_BN: Tensor) -> Tensor:
    """Five base-3 digits to a byte, which is scaled so that a digit is what overflows when multiplied by 3.

    Of 256 fields, 160 are 32 apart in 32 bytes, 80 are 16 apart in 16, and the last 16 are four apart in four.
    """
    parts = torch.split(fields_BN, [160, 80, 16], -1)
    packed = []
    for part, width in zip(parts, (32, 16, 4), strict=True):
        digits = divided(part.to(torch.int32), -1, width)
        powers = torch.tensor(_POWERS[: digits.shape[-2]], dtype=torch.int32, device=part.device)[:, None]
        packed.append((digits * powers).sum(-2))
    return ((torch.cat(packed, -1) * 256 + 242) // 243).to(torch.uint8)


def untrits(packed_BC: Tensor) -> Tensor:
    """What `trits` was given."""
    found = []
    for part, count in zip(torch.split(packed_BC, [32, 16, 4], -1), (_TRITS, _TRITS, 4), strict=True):
        digits = [(part.to(torch.int32) * 3**place & 255) * 3 >> 8 for place in range(count)]
        found.append(torch.stack(digits, -2).flatten(-2))
    return torch.cat(found, -1).to(torch.uint8)


def as_bytes(value: Tensor) -> Tensor:
    """A float16 as its two bytes, along a new last axis."""
    return value.contiguous()[..., None].view(torch.uint8)


def as_float16(bytes_2: Tensor) -> Tensor:
    """What `as_bytes` was given."""
    return bytes_2.contiguous().view(torch.float16).squeeze(-1)
