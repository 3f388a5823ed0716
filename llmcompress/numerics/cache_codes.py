"""Quantizes keys and values to one byte per number, with a scale stored after each vector or a fixed one.

A cached vector is one key or one value of one head and one token; all functions work along the last axis.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Number = Literal["int8", "fp8"]
"""Eight-bit integers -128 … 127, or floats E4M3 (-448 … 448)."""

_LOWEST = {"int8": -128.0, "fp8": -448.0}
_LARGEST = {"int8": 127.0, "fp8": 448.0}
SCALE_BYTES = 2
"""A scale that is stored with its vector is a bfloat16."""


def scale_for(peak: Tensor, number: Number) -> Tensor:
    """The scale at which the largest magnitude lies on the outermost code, as a value of bfloat16; 1 for zeros."""
    scale = (peak.float() / _LARGEST[number]).to(torch.bfloat16)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def to_codes(x: Tensor, scale: Tensor, number: Number) -> Tensor:
    """The nearest codes, as int8 (of floats: their bits); what lies outside is clipped."""
    steps = (x.float() / scale.float()).clamp(_LOWEST[number], _LARGEST[number])
    if number == "fp8":
        return steps.to(torch.float8_e4m3fn).view(torch.int8)
    return steps.round().to(torch.int8)


def from_codes(codes: Tensor, scale: Tensor, number: Number, dtype: torch.dtype) -> Tensor:
    """The numbers that codes stand for."""
    steps = codes.contiguous().view(torch.float8_e4m3fn) if number == "fp8" else codes
    return (steps.float() * scale.float()).to(dtype)


def pack_vectors(x: Tensor, number: Number) -> Tensor:
    """Every vector in codes, followed by the two bytes of its own scale: … × width → … × (width + 2), int8.

    One tensor, so that whatever selects, repeats or cuts cached tokens takes the scales along.
    """
    scale = scale_for(x.abs().amax(-1, keepdim=True), number)
    return torch.cat([to_codes(x, scale, number), scale.view(torch.int8)], dim=-1)


def unpack_vectors(packed: Tensor, number: Number, dtype: torch.dtype) -> Tensor:
    """What `pack_vectors` stored."""
    scale = packed[..., -SCALE_BYTES:].contiguous().view(torch.bfloat16)
    return from_codes(packed[..., :-SCALE_BYTES], scale, number, dtype)
