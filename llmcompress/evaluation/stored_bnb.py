"""The linears of a checkpoint that bitsandbytes quantized, by us or by anybody. O = outputs, I = inputs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcompress.loading.tensors import TensorHeader, Tensors
from llmcompress.numerics.packing import unpack_bits

_STATE = ".quant_state.bitsandbytes__"
_CONSTANT = ("quant_map", "nested_quant_map", "weight_format", "quant_state")
"""The same in every linear, or no more than its shape."""


@dataclass(frozen=True)
class BnbSite:
    """One linear in 4-bit codes of a table of 16 values, or in int8."""

    name: str
    outputs: int
    inputs: int
    code_bits: int
    """Of one code, in the file and at best."""
    tensors: Mapping[str, TensorHeader]
    """By what follows the linear's name: `weight`, `weight.absmax`, `SCB`, …"""

    @property
    def weights(self) -> int:
        """How many the codes stand for."""
        return self.outputs * self.inputs

    @property
    def ideal_bits(self) -> int:
        """Codes, scales, and scales of scales with their offset."""
        scales = [
            tensor
            for name, tensor in self.tensors.items()
            if name != "weight" and not name.removeprefix("weight.").startswith(_CONSTANT)
        ]
        offset = 32 * ("weight.nested_absmax" in self.tensors)
        return self.weights * self.code_bits + 8 * sum(tensor.bytes for tensor in scales) + offset

    def codes(self, read: Tensors) -> Tensor:
        """O×I int16: each code less that of 0, so 0 is a weight of zero."""
        stored = read(self.tensors["weight"])
        if self.code_bits == 8:
            return stored.to(torch.int16)
        # two codes a byte, the first one high; the file may call the bytes by a wider type
        bytes_1B = stored.contiguous().view(torch.uint8).reshape(1, -1)
        swapped_1B = (bytes_1B << 4) | (bytes_1B >> 4)
        codes = unpack_bits(swapped_1B, 4, 0, self.weights).to(torch.int16)
        zero = int(read(self.tensors["weight.quant_map"]).abs().argmin())
        return codes.reshape(self.outputs, self.inputs) - zero


def bnb_sites(found: Mapping[str, TensorHeader]) -> Iterator[BnbSite]:
    """Every quantized linear among the tensors of a checkpoint."""
    read = Tensors()
    for name, tensor in found.items():
        if _STATE in name:
            linear = name.partition(_STATE)[0].removesuffix(".weight")
            state: dict[str, Any] = json.loads(bytes(read(tensor).tolist()))
            outputs, inputs = state["shape"]
            yield BnbSite(linear, outputs, inputs, 4, _at(linear, found))
        elif name.endswith(".SCB"):
            linear = name.removesuffix(".SCB")
            outputs, inputs = found[f"{linear}.weight"].shape
            yield BnbSite(linear, outputs, inputs, 8, _at(linear, found))


def _at(linear: str, found: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """Its tensors, the bias left out."""
    inside = {name.removeprefix(f"{linear}."): each for name, each in found.items() if name.startswith(f"{linear}.")}
    return {name: each for name, each in inside.items() if name != "bias"}
