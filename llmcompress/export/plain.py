"""Saves every quantized linear multiplied out to ordinary weights: any loader reads it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.errors import CompressError
from llmcompress.export.base import Saved
from llmcompress.export.checkpoint import linears_of_loader, quantized_sites, write_model
from llmcompress.export.config import portable_config
from llmcompress.modules.quant_linear import QuantLinear


def save_plain(model: PreTrainedModel, folder: Path, *, storage_dtype: torch.dtype, max_shard_size: str) -> Saved:
    """Write an ordinary Hugging Face folder; the model is not changed.

    Products of codes and scales are rounded to `storage_dtype` exactly as the model itself does when it is cast to
    that dtype, so a loader that uses it gets the same logits bit for bit; float32 keeps every product exact.

    Raises: CompressError when a site rounds activations, which ordinary weights cannot.
    """
    sites = quantized_sites(model)
    rounding = [name for name, site in sites.items() if site.scheme.activations]
    if rounding:
        raise CompressError(
            "save.plain-activations",
            f"{len(rounding)} sites round activations, which a plain folder cannot hold",
            where=rounding[0],
            fix="set `save.format` to compressed-tensors",
            saved="all blocks are kept: run again with another format",
        )
    classes = linears_of_loader(model)
    files, size = write_model(
        model,
        folder,
        portable_config(model, storage_dtype),
        lambda name, site: dense_tensors(site, classes.get(name, nn.Linear), storage_dtype),
        storage_dtype=storage_dtype,
        max_shard_size=max_shard_size,
    )
    return Saved(files, size, "plain", dict.fromkeys(sites, "plain format"))


def dense_tensors(site: QuantLinear, loader_class: type[nn.Module], storage_dtype: torch.dtype) -> dict[str, Tensor]:
    """Weight and bias of a quantized site in the layout of the class that will load them."""
    weight_OI = site.dense_weight().to(storage_dtype)
    tensors = {"weight": weight_OI if issubclass(loader_class, nn.Linear) else weight_OI.T}
    return tensors if site.bias is None else {**tensors, "bias": site.bias.detach().to(storage_dtype)}
