"""Our quantizer for transformers: `from_pretrained` builds what the manifest in config.json describes.

`import llmcompress` registers it as soon as transformers' own quantizers are imported (`llmcompress/__init__.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:  # transformers is still being imported when this module is
    from transformers import PreTrainedModel

METHOD = "llmcompress"
"""`quantization_config.quant_method` in config.json."""


@register_quantization_config(METHOD)
class ManifestConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The manifest as transformers carries it in a config."""

    def __init__(self, **manifest: Any) -> None:
        self.quant_method = METHOD
        self.version = manifest.pop("version", 1)
        self.modules = manifest.pop("modules", {})
        self.shapes = manifest.pop("shapes", {})
        self.attributes = manifest.pop("attributes", {})


@register_quantizer(METHOD)
class ManifestQuantizer(HfQuantizer):  # type: ignore[misc]
    """Changes the empty stock model before its weights are read."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        from llmcompress.modules.manifest import Manifest, apply_manifest

        config = self.quantization_config
        manifest = Manifest(config.modules, config.shapes, config.attributes)
        apply_manifest(model, manifest, model.dtype)
        _swap_codes(model, packed=True)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        _swap_codes(model, packed=False)
        return model

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """Whatever the caller asks for."""
        return dtype

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """`save_pretrained` would write codes unpacked: llmcompress writes these folders."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Not through transformers."""
        return False


def _swap_codes(model: nn.Module, *, packed: bool) -> None:
    """Every quantized linear in its packed form, for which the file has tensors; or back."""
    from llmcompress.modules.packed import PackedLinear
    from llmcompress.modules.quant_linear import QuantLinear

    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if packed and isinstance(module, QuantLinear):
            setattr(model.get_submodule(parent), leaf, PackedLinear.empty(module))
        elif not packed and isinstance(module, PackedLinear):
            setattr(model.get_submodule(parent), leaf, module.unpack())
