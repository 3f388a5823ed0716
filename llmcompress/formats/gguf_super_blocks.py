"""The super-blocks of GGUF's K-quants: how codes, the integers of scales and minima, and float16 numbers lie in bytes.

O = outputs, I = inputs, S = super-blocks of a row, N = the 256 inputs of one, K = its groups, L = float16 numbers that
they share, C = bytes.

Source: `block_q2_K` to `block_q6_K` in ggml-common.h and `dequantize_row_q*_K` in ggml-quants.c of ggml.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.formats.gguf_fields import (
    as_bytes,
    as_float16,
    divided,
    nibbles,
    pairs,
    single_bits,
    unnibbled,
    unpaired,
    unsingle,
)

SUPER_BLOCK = 256


@dataclass(frozen=True, eq=False)
class Fields:
    """What the bytes of super-blocks say, as unsigned integers but for the signed scales of Q3_K and Q6_K."""

    codes_OSN: Tensor
    scale_OSK: Tensor
    minimum_OSK: Tensor | None
    shared_OSL: Tensor
    """Float16."""


def pack_super_blocks(fields: Fields, name: str) -> Tensor:
    """O×S×C uint8, for the type of that name."""
    return _LAYOUTS[name].pack(fields)


def unpack_super_blocks(packed_OSC: Tensor, name: str) -> Fields:
    """What was packed."""
    return _LAYOUTS[name].unpack(packed_OSC)


def _pack_2(fields: Fields) -> Tensor:
    assert fields.minimum_OSK is not None
    scales = _uint8(fields.scale_OSK) | _uint8(fields.minimum_OSK) << 4
    return torch.cat([scales, pairs(fields.codes_OSN), _shared(fields)], -1)


def _unpack_2(packed_OSC: Tensor) -> Fields:
    scales, codes, shared = torch.split(packed_OSC, [16, 64, 4], -1)
    return Fields(unpaired(codes), scales & 15, scales >> 4, _floats(shared))


def _pack_3(fields: Fields) -> Tensor:
    codes = fields.codes_OSN
    scale_OSK = (fields.scale_OSK.to(torch.int16) + 32).to(torch.uint8)
    low, high = nibbles(scale_OSK & 15), divided(scale_OSK >> 4, 4, 4)
    high = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    return torch.cat([single_bits(codes >> 2), pairs(codes & 3), low, high, _shared(fields)], -1)


def _unpack_3(packed_OSC: Tensor) -> Fields:
    top, codes, low, high, shared = torch.split(packed_OSC, [32, 64, 8, 4, 2], -1)
    high = torch.cat([high >> place & 3 for place in (0, 2, 4, 6)], -1)
    scale_OSK = (unnibbled(low) | high << 4).to(torch.int16) - 32
    return Fields(unpaired(codes) | unsingle(top) << 2, scale_OSK, None, _floats(shared))


def _pack_4(fields: Fields) -> Tensor:
    return torch.cat([_shared(fields), _six_bits(fields), nibbles(divided(fields.codes_OSN, 4, 64)).flatten(-2)], -1)


def _unpack_4(packed_OSC: Tensor) -> Fields:
    shared, scales, codes = torch.split(packed_OSC, [4, 12, 128], -1)
    return Fields(unnibbled(divided(codes, 4, 32)).flatten(-2), *_from_six_bits(scales), _floats(shared))


def _pack_5(fields: Fields) -> Tensor:
    codes = nibbles(divided(fields.codes_OSN & 15, 4, 64)).flatten(-2)
    return torch.cat([_shared(fields), _six_bits(fields), single_bits(fields.codes_OSN >> 4), codes], -1)


def _unpack_5(packed_OSC: Tensor) -> Fields:
    shared, scales, top, codes = torch.split(packed_OSC, [4, 12, 32, 128], -1)
    low = unnibbled(divided(codes, 4, 32)).flatten(-2)
    return Fields(low | unsingle(top) << 4, *_from_six_bits(scales), _floats(shared))


def _pack_6(fields: Fields) -> Tensor:
    low = nibbles(divided(fields.codes_OSN & 15, 2, 128)).flatten(-2)
    scales = fields.scale_OSK.to(torch.int8).view(torch.uint8)
    return torch.cat([low, pairs(fields.codes_OSN >> 4), scales, _shared(fields)], -1)


def _unpack_6(packed_OSC: Tensor) -> Fields:
    low, high, scales, shared = torch.split(packed_OSC, [128, 64, 16, 2], -1)
    codes = unnibbled(divided(low, 2, 64)).flatten(-2) | unpaired(high) << 4
    return Fields(codes, scales.contiguous().view(torch.int8), None, _floats(shared))


def _six_bits(fields: Fields) -> Tensor:
    """Eight scales and eight minima of six bits in twelve bytes."""
    assert fields.minimum_OSK is not None
    scale_OSK, minimum_OSK = _uint8(fields.scale_OSK), _uint8(fields.minimum_OSK)
    (first, last), (first_minimum, last_minimum) = scale_OSK.chunk(2, -1), minimum_OSK.chunk(2, -1)
    return torch.cat(
        [first | last >> 4 << 6, first_minimum | last_minimum >> 4 << 6, (last & 15) | (last_minimum & 15) << 4], -1
    )


def _from_six_bits(packed_OSC: Tensor) -> tuple[Tensor, Tensor]:
    scale, minimum, low = packed_OSC.chunk(3, -1)
    return (
        torch.cat([scale & 63, (low & 15) | scale >> 6 << 4], -1),
        torch.cat([minimum & 63, low >> 4 | minimum >> 6 << 4], -1),
    )


def _uint8(integers: Tensor) -> Tensor:
    return integers.to(torch.uint8)


def _shared(fields: Fields) -> Tensor:
    return as_bytes(fields.shared_OSL).flatten(-2)


def _floats(bytes_OSC: Tensor) -> Tensor:
    return as_float16(divided(bytes_OSC, -1, 2))


@dataclass(frozen=True)
class _Layout:
    pack: Callable[[Fields], Tensor]
    unpack: Callable[[Tensor], Fields]


_LAYOUTS: Mapping[str, _Layout] = {
    "Q2_K": _Layout(_pack_2, _unpack_2),
    "Q3_K": _Layout(_pack_3, _unpack_3),
    "Q4_K": _Layout(_pack_4, _unpack_4),
    "Q5_K": _Layout(_pack_5, _unpack_5),
    "Q6_K": _Layout(_pack_6, _unpack_6),
}
