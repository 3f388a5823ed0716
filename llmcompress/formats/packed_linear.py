"""Replaces a quantized linear while a folder in our own format is loaded: tensors in the layout of `packed.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmcompress.formats import packed
from llmcompress.modules.quant_linear import QuantLinear, as_bits, quantized_linears


class PackedLinear(nn.Module):
    """Buffers under the names in the file, on the linear's device; the loader fills them."""

    def __init__(self, site: QuantLinear) -> None:
        super().__init__()
        self._kind, self._spec, self._dtype = type(site), site.spec(), site.scale_OG.dtype
        shape = (site.out_features, site.in_features)
        for name, (dtype, size) in packed.tensors(shape, site.scheme, self._dtype, bias=False).items():
            self.register_buffer(name, torch.zeros(size, dtype=dtype, device=site.codes_OI.device))
        self.bias = site.bias

    def unpack(self) -> QuantLinear:
        """The linear that was packed, bit for bit."""
        site = self._kind.from_spec(self._spec, self._dtype)
        found: dict[str, Tensor] = dict(self.named_buffers())
        tensor = packed.unpack(found, site.scheme, site.in_features, self._dtype).tensor
        site.codes_OI, site.scale_OG, site.zero_OG = tensor.codes, tensor.scale, tensor.zero_point
        # float32 numbers stay the integers that casts leave alone
        site.input_scale = found.get("input_scale")
        site.shared_scale = None if tensor.shared_scale is None else as_bits(tensor.shared_scale)
        site.bias = self.bias
        return site


def enter_file_forms(model: nn.Module) -> None:
    """Put every quantized linear into its packed form, for which a file has tensors; empty, in place."""
    for name, module in quantized_linears(model).items():
        _put(model, name, PackedLinear(module))


def leave_file_forms(model: nn.Module) -> None:
    """The quantized linears again, in place, with what was loaded into their packed forms."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            _put(model, name, module.unpack())


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
