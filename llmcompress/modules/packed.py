"""A quantized linear as our manifest stores it: codes packed to their own width. Only between file and memory."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from llmcompress.modules.quant_linear import QuantLinear, quantized_linears
from llmcompress.numerics.formats import scales_from_bytes, scales_to_bytes
from llmcompress.numerics.packing import pack_bits, packed_bytes, unpack_bits


class PackedLinear(nn.Module):
    """Holds a `QuantLinear` while a checkpoint is written or read; `weight` is uint8, O×bytes.

    That `weight` has another shape than the stock linear's, so a loader without our plug-in refuses the file: codes of
    a whole byte lie in one row.
    """

    def __init__(self, form: QuantLinear, packed_OB: Tensor) -> None:
        super().__init__()
        self._kind, self._spec, self._dtype = type(form), form.spec(), form.scale_OG.dtype
        self.register_buffer("weight", packed_OB)
        self.register_buffer("scale", scales_to_bytes(form.scale_OG, form.scheme.weights.scales))
        self.register_buffer("zero_point", form.zero_OG)
        self.register_buffer("input_scale", form.input_scale)
        self.register_buffer("shared_scale", form.shared_scale)
        self.bias = form.bias

    @classmethod
    def pack(cls, site: QuantLinear) -> Self:
        """The packed form of a quantized linear, sharing its scales."""
        grid = site.scheme.weights
        packed_OB = pack_bits(site.codes_OI, grid.bits, grid.low)
        return cls(site, packed_OB.flatten() if grid.bits == 8 else packed_OB)

    @classmethod
    def empty(cls, site: QuantLinear) -> Self:
        """Room for the packed form of a linear of that kind, on its device."""
        bits = site.scheme.weights.bits
        shape = (site.out_features, packed_bytes(site.in_features, bits))
        size = (shape[0] * shape[1],) if bits == 8 else shape
        return cls(site, torch.zeros(size, dtype=torch.uint8, device=site.codes_OI.device))

    def unpack(self) -> QuantLinear:
        """The linear that was packed, bit for bit."""
        site = self._kind.from_spec(self._spec, self._dtype)
        grid = site.scheme.weights
        packed_OB = self.get_buffer("weight").reshape(site.out_features, -1)
        site.codes_OI = unpack_bits(packed_OB, grid.bits, grid.low, site.in_features)
        site.scale_OG = scales_from_bytes(self.get_buffer("scale"), grid.scales, self._dtype)
        site.zero_OG = self._optional("zero_point")
        site.input_scale = self._optional("input_scale")
        site.shared_scale = self._optional("shared_scale")
        site.bias = self.bias
        return site

    def _optional(self, name: str) -> Tensor | None:
        found = self._buffers[name]
        return found if isinstance(found, Tensor) else None


def enter_file_forms(model: nn.Module) -> None:
    """Put every quantized linear into its packed form, for which a file has tensors; empty, in place."""
    for name, module in quantized_linears(model).items():
        _put(model, name, PackedLinear.empty(module))


def leave_file_forms(model: nn.Module) -> None:
    """The quantized linears again, in place, with what was loaded into their packed forms."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            _put(model, name, module.unpack())


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
