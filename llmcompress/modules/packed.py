"""A quantized linear as our manifest stores it: codes packed to their own width. Only between file and memory."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.numerics.packing import pack_bits, packed_bytes, unpack_bits


class PackedLinear(nn.Module):
    """Holds a `QuantLinear` while a checkpoint is written or read; `weight` is uint8, O×bytes.

    That `weight` has another shape than the stock linear's, so a loader without our plug-in refuses the file.
    """

    def __init__(self, form: QuantLinear, packed_OB: Tensor) -> None:
        super().__init__()
        self._spec = form.spec()
        self.register_buffer("weight", packed_OB)
        self.register_buffer("scale", form.scale_OG)
        self.register_buffer("zero_point", form.zero_OG)
        self.register_buffer("input_scale", form.input_scale)
        self.bias = form.bias

    @classmethod
    def pack(cls, site: QuantLinear) -> Self:
        """The packed form of a quantized linear, sharing its scales."""
        grid = site.scheme.weights
        return cls(site, pack_bits(site.codes_OI, grid.bits, grid.low))

    @classmethod
    def empty(cls, site: QuantLinear) -> Self:
        """Room for the packed form of a linear of that kind, on its device."""
        size = packed_bytes(site.in_features, site.scheme.weights.bits)
        return cls(site, torch.zeros(site.out_features, size, dtype=torch.uint8, device=site.codes_OI.device))

    def unpack(self) -> QuantLinear:
        """The linear that was packed, bit for bit."""
        scale_OG = self.get_buffer("scale")
        site = QuantLinear.from_spec(self._spec, scale_OG.dtype)
        grid = site.scheme.weights
        return QuantLinear(
            site.scheme,
            unpack_bits(self.get_buffer("weight"), grid.bits, grid.low, site.in_features),
            scale_OG,
            self._optional("zero_point"),
            None if self.bias is None else self.bias.data,
            self._optional("input_scale"),
        )

    def _optional(self, name: str) -> Tensor | None:
        found = self._buffers[name]
        return found if isinstance(found, Tensor) else None
