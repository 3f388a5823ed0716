"""Our quantizer for transformers: `from_pretrained` builds what the manifest in config.json describes.

`import llmcompress` registers it as soon as transformers' own quantizers are imported (`llmcompress/__init__.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
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
        self.archive = manifest.pop("archive", {})
        """Bytes of every entropy-coded tensor, by name; empty: the tensors are as they are."""


@register_quantizer(METHOD)
class ManifestQuantizer(HfQuantizer):  # type: ignore[misc]
    """Changes the empty stock model before its weights are read."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        from llmcompress.formats.archived_model import enter_archive
        from llmcompress.formats.packed_linear import enter_file_forms
        from llmcompress.modules.manifest import Manifest, apply_manifest

        config = self.quantization_config
        manifest = Manifest(config.modules, config.shapes, config.attributes)
        apply_manifest(model, manifest, model.dtype)
        enter_file_forms(model)
        self._waiting = enter_archive(model, config.archive)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        from llmcompress.formats.archived_model import leave_archive
        from llmcompress.formats.packed_linear import leave_file_forms

        leave_archive(model, self._waiting)
        leave_file_forms(model)
        return model

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """Any dtype of the caller."""
        return dtype

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """`save_pretrained` would write codes unpacked: llmcompress writes these folders."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Not through transformers."""
        return False
