"""Saves every replaced module multiplied out to ordinary weights: any loader reads it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmcompress.calibration.homes import Home
from llmcompress.errors import CompressError
from llmcompress.export.base import Saved
from llmcompress.export.checkpoint import linears_of_loader, write_model
from llmcompress.export.config import portable_config
from llmcompress.model.stock import stock_outline
from llmcompress.modules.base import CompressedModule
from llmcompress.modules.experts import UnfusedExperts
from llmcompress.modules.manifest import changes
from llmcompress.modules.wrapper import Wrapper


def save_plain(
    model: PreTrainedModel,
    folder: Path,
    *,
    storage_dtype: torch.dtype,
    max_shard_size: str,
    home: Home | None = None,
) -> Saved:
    """Write an ordinary Hugging Face folder; the model is not changed.

    Products are rounded to `storage_dtype` exactly as the model itself does when it is cast to that dtype, so a loader
    that uses it gets the same logits bit for bit; float32 keeps every product of codes and scales exact.

    Raises: CompressError when ordinary weights cannot say what the model computes: a site rounds activations, widths
    differ from block to block, or a module decides per input what to compute.
    """
    _refuse_other_shapes(model)
    sites = replaced_modules(model)
    rounding = [name for name, site in sites.items() if not site.expression().is_linear]
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
        {
            name: partial(dense_tensors, site, classes.get(name, nn.Linear), storage_dtype)
            for name, site in sites.items()
        },
        storage_dtype=storage_dtype,
        max_shard_size=max_shard_size,
        home=home,
    )
    return Saved(files, size, "plain", dict.fromkeys(sites, "plain format"))


def replaced_modules(model: nn.Module) -> dict[str, CompressedModule]:
    """Full name → outermost compressed modules, those inside another one left out."""
    found: dict[str, CompressedModule] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, CompressedModule) and not isinstance(module, UnfusedExperts) and not inside:
            found[name] = module
    return found


def dense_tensors(
    site: CompressedModule, loader_class: type[nn.Module], storage_dtype: torch.dtype
) -> dict[str, Tensor]:
    """Weight and bias of a replaced module in the layout of the class that will load them."""
    weight_OI = site.dense_weight().detach().to(storage_dtype)
    tensors = {"weight": weight_OI.T if issubclass(loader_class, Conv1D) else weight_OI}
    bias = site.dense_bias()
    return tensors if bias is None else {**tensors, "bias": bias.detach().to(storage_dtype)}


def _refuse_other_shapes(model: PreTrainedModel) -> None:
    found = changes(model, stock_outline(model))
    wrapped = [name for name, module in model.named_modules() if isinstance(module, Wrapper)]
    other = [*wrapped, *found.shapes, *found.attributes]
    if other:
        raise CompressError(
            "save.plain-shapes",
            "a plain folder cannot hold this model: no config of its family describes these modules",
            where=", ".join(other[:3]),
            fix="set `save.format` to auto: the folder then loads after `import llmcompress`",
            saved="all finished work: run again with another format",
        )
