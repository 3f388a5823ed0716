"""Tensors as they lie in a store: numbers in the checkpoint's dtype, codes packed, zeros as a mask. O = rows.

Decoding gives the very tensor back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from llmcompress.numerics.packing import pack_bits, packed_bytes, unpack_bits

Form = dict[str, Any]
"""How a tensor was encoded, as JSON holds it."""

_WHOLE_IN_BYTES = (1, 2, 4)
"""Bits of codes of which a byte holds a whole number: others take longer to read than they save."""


@dataclass(frozen=True)
class Encoded:
    """The parts of one tensor, by suffix, and what is needed to read them."""

    parts: Mapping[str, Tensor]
    form: Form


def encode(tensor: Tensor, storage: torch.dtype) -> Encoded:
    """The smallest of the forms that give the tensor back."""
    tensor = tensor.detach().cpu()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_floating_point():
        smaller = tensor.to(storage)
        kept = smaller if torch.equal(smaller.to(tensor.dtype), tensor) else tensor
        zeros = int((kept == 0).sum()) if kept.dim() == 2 else 0
        # a mask takes one bit of every weight
        if zeros * kept.element_size() * 8 > kept.numel():
            return _masked(kept, dtype)
        return Encoded({"": kept.contiguous()}, {"dtype": dtype})
    if tensor.dtype == torch.int8 and tensor.dim() == 2 and tensor.numel():
        low, high = int(tensor.min()), int(tensor.max())
        bits = next((bits for bits in _WHOLE_IN_BYTES if high - low < 1 << bits), None)
        if bits is not None:
            form = {"packed": bits, "low": low, "count": tensor.shape[1], "dtype": dtype}
            return Encoded({"": pack_bits(tensor, bits, low)}, form)
    return Encoded({"": tensor.contiguous()}, {"dtype": dtype})


def packed_bits(bits: int) -> int:
    """In how many bits a code of so many lies in a store."""
    return next((whole for whole in _WHOLE_IN_BYTES if bits <= whole), 8)


def decode(read: Callable[[str], Tensor], form: Form) -> Tensor:
    """The tensor again; `read` gives its parts by suffix."""
    dtype = getattr(torch, form["dtype"])
    if "packed" in form:
        return _unpacked(read(""), form["packed"], form["low"], form["count"])
    if "columns" in form:
        kept_OI = _unpacked(read(".mask"), 1, 0, form["columns"]).bool()
        values = read("")
        found_OI = torch.zeros(kept_OI.shape, dtype=dtype)
        found_OI[kept_OI] = values.to(dtype)
        return found_OI
    return read("").to(dtype)


def _masked(weight_OI: Tensor, dtype: str) -> Encoded:
    kept_OI = weight_OI != 0
    parts = {"": weight_OI[kept_OI], ".mask": pack_bits(kept_OI.to(torch.int8), 1, 0)}
    return Encoded(parts, {"columns": weight_OI.shape[1], "dtype": dtype})


def _unpacked(packed_OB: Tensor, bits: int, low: int, count: int) -> Tensor:
    """As `unpack_bits`, by a table: a byte is looked up, not shifted bit by bit."""
    if bits not in _WHOLE_IN_BYTES:
        return unpack_bits(packed_OB, bits, low, count)
    table_BE = _TABLES[bits] + low
    assert packed_OB.shape[1] == packed_bytes(count, bits)
    return table_BE[packed_OB.int()].flatten(1)[:, :count].contiguous()


def _table(bits: int) -> Tensor:
    values_B1 = torch.arange(256, dtype=torch.int16)[:, None]
    places_E = torch.arange(0, 8, bits, dtype=torch.int16)
    return (values_B1 >> places_E & (1 << bits) - 1).to(torch.int8)


_TABLES: Mapping[int, Tensor] = MappingProxyType({bits: _table(bits) for bits in _WHOLE_IN_BYTES})
"""Bits → for every byte the codes that it holds."""
