"""Saves what no other format has words for: a config with our manifest, read by our plug-in for transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.calibration.homes import Home
from llmcompress.export.base import Saved
from llmcompress.export.checkpoint import quantized_sites, write_model
from llmcompress.export.config import portable_config
from llmcompress.modules.manifest import Manifest
from llmcompress.modules.packed import PackedLinear
from llmcompress.modules.quant_linear import QuantLinear

METHOD = "llmcompress"
VERSION = 1


def save_with_manifest(
    model: PreTrainedModel,
    folder: Path,
    found: Manifest,
    *,
    storage_dtype: torch.dtype,
    max_shard_size: str,
    home: Home | None = None,
) -> Saved:
    """Write a folder that `from_pretrained` loads after `import llmcompress` and refuses without."""
    config = portable_config(model, storage_dtype)
    config["quantization_config"] = {"quant_method": METHOD, "version": VERSION, **found.to_json()}
    files, size = write_model(
        model,
        folder,
        config,
        {name: partial(packed_tensors, site, storage_dtype) for name, site in quantized_sites(model).items()},
        storage_dtype=storage_dtype,
        max_shard_size=max_shard_size,
        home=home,
    )
    return Saved(files, size, METHOD)


def packed_tensors(site: QuantLinear, storage_dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes at their own width, scales and bias as they are stored."""
    tensors = PackedLinear.pack(site).state_dict()
    return {name: part.to(storage_dtype) if part.is_floating_point() else part for name, part in tensors.items()}
