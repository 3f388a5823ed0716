"""The tensors of a linear quantized with bitsandbytes. O = outputs, I = inputs.

The package itself writes the layout (`BnbLinear.native_tensors`); it is read here without the package.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.formats.named import Named
from llmcompress.numerics.packing import unpack_bits

STATE = ".quant_state.bitsandbytes__"
"""Part of the name of the tensor with the layout of 4-bit codes, as JSON."""

_CONSTANT = ("quant_map", "nested_quant_map", "weight_format", "quant_state")
"""The same in every linear, or no more than its shape."""


@dataclass(frozen=True)
class BnbCodes:
    """Codes of the table's 16 values, or int8."""

    codes: Tensor
    """O×I int8."""
    zero: int
    """The code of 0."""

    def centred_codes(self) -> Tensor:
        """O×I int16: each code less that of 0, so that 0 is a weight of zero."""
        return self.codes.to(torch.int16) - self.zero


def unpack(found: Named, shape: tuple[int, int]) -> BnbCodes:
    """The codes of a linear of that shape (O, I), from its `weight` and, where they have 4 bits, its `quant_map`."""
    stored = found["weight"]
    if "SCB" in found:
        return BnbCodes(stored, 0)
    # two codes a byte, the first one high; the file may call the bytes by a wider type
    bytes_1B = stored.contiguous().view(torch.uint8).reshape(1, -1)
    swapped_1B = (bytes_1B << 4) | (bytes_1B >> 4)
    codes_OI = unpack_bits(swapped_1B, 4, 0, shape[0] * shape[1]).view(shape)
    return BnbCodes(codes_OI, int(found["weight.quant_map"].abs().argmin()))


def shape_of(state: Tensor) -> tuple[int, int]:
    """Outputs and inputs, from the tensor under the name of `STATE`."""
    outputs, inputs = json.loads(bytes(state.tolist()))["shape"]
    return int(outputs), int(inputs)


def is_constant(name: str) -> bool:
    """Whether a tensor besides the codes is not needed for the weights."""
    return name.removeprefix("weight.").startswith(_CONSTANT)
