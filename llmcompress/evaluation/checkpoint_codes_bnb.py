"""The linears of a checkpoint that are quantized with bitsandbytes. O = outputs, I = inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from llmcompress.formats.bitsandbytes import STATE, is_constant, shape_of, unpack
from llmcompress.loading.tensors import TensorHeader, Tensors


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
        """Number of quantized weights."""
        return self.outputs * self.inputs

    @property
    def ideal_bits(self) -> int:
        """Codes, scales, and scales of scales with their offset."""
        scales = [tensor for name, tensor in self.tensors.items() if name != "weight" and not is_constant(name)]
        offset = 32 * ("weight.nested_absmax" in self.tensors)
        return self.weights * self.code_bits + 8 * sum(tensor.bytes for tensor in scales) + offset

    def codes(self, read: Tensors) -> Tensor:
        """O×I int16: each code less that of 0, so 0 is a weight of zero."""
        needed = {
            name: read(each) for name, each in self.tensors.items() if name in ("weight", "weight.quant_map", "SCB")
        }
        return unpack(needed, (self.outputs, self.inputs)).centred_codes()


def bnb_sites(found: Mapping[str, TensorHeader]) -> Iterator[BnbSite]:
    """Every quantized linear among the tensors of a checkpoint."""
    read = Tensors()
    for name, tensor in found.items():
        if STATE in name:
            linear = name.partition(STATE)[0].removesuffix(".weight")
            yield BnbSite(linear, *shape_of(read(tensor)), 4, _at(linear, found))
        elif name.endswith(".SCB"):
            linear = name.removesuffix(".SCB")
            outputs, inputs = found[f"{linear}.weight"].shape
            yield BnbSite(linear, outputs, inputs, 8, _at(linear, found))


def _at(linear: str, found: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """Its tensors, without the bias."""
    inside = {name.removeprefix(f"{linear}."): each for name, each in found.items() if name.startswith(f"{linear}.")}
    return {name: each for name, each in inside.items() if name != "bias"}
