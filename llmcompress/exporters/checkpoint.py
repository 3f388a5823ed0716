"""Writes a live model as an ordinary Hugging Face checkpoint, one block at a time, under the names on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.calibration.offloading import WeightStore
from llmcompress.errors import CompressError
from llmcompress.exporters.base import Writing
from llmcompress.exporters.shards import ShardWriter
from llmcompress.loading.versions import TRANSFORMERS_MAJOR
from llmcompress.modules.quant_linear import quantized_linears

Replaced = Mapping[str, Callable[[], dict[str, Tensor]]]
"""Full name of a module that looks different on disk → its tensors there, under names relative to the module."""

Encoder = Callable[[str, Tensor], Tensor]
"""Name on disk and tensor → what the file holds under that name."""

_BLOCK = re.compile(r".*?\.\d+\.")


def write_model(
    model: PreTrainedModel,
    folder: Path,
    config: Mapping[str, Any],
    replaced: Replaced,
    writing: Writing,
    *,
    encode: Encoder | None = None,
) -> tuple[tuple[str, ...], int]:
    """Write weights and `config.json`; the names of the weight files and the bytes of all tensors.

    `encode` gives what is written in the place of a tensor; the config is written when it has seen all of them.
    """
    if writing.sizes is None:
        folder.mkdir(parents=True, exist_ok=True)
    writer = writing.sizes or ShardWriter(folder, writing.max_shard_size)
    for name, tensor in _tensors_on_disk(model, replaced, writing.storage_dtype, writing.weights_at):
        writer.add(name, tensor if encode is None else encode(name, tensor))
    files = writer.close()
    if writing.sizes is None:
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return files, writer.tensor_bytes


def _tensors_on_disk(
    model: PreTrainedModel, replaced: Replaced, storage_dtype: torch.dtype, weights_at: WeightStore
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint, converted one block at a time; of tied tensors only the first name."""
    begun: set[str] = set()
    repeated = repeated_tensors(model)
    for prefix, names in groupby(list(model.state_dict()), key=block_of):
        block: dict[str, Tensor] = {}
        for name in names:
            owner = owner_of(name, replaced)
            if owner is not None:
                if owner not in begun:
                    begun.add(owner)
                    _check_products(model.get_submodule(owner), storage_dtype, owner)
                    for part, value in replaced[owner]().items():
                        block[f"{owner}.{part}"] = _checked(value, storage_dtype, f"{owner}.{part}")
            elif name not in repeated:
                block[name] = _stored(_tensor(model, name), storage_dtype, name)
        yield from _under_names_on_disk(model, block).items()
        if prefix:
            weights_at.leave(prefix.removesuffix("."), model.get_submodule(prefix.removesuffix(".")))


def repeated_tensors(model: nn.Module) -> set[str]:
    """Names of tensors that are in the same memory as an earlier one."""
    seen: set[tuple[int, torch.Size]] = set()
    found = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        place = (tensor.data_ptr(), tensor.shape)
        if place in seen and tensor.numel():
            found.add(name)
        seen.add(place)
    return found


def _tensor(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer itself."""
    owner, _, leaf = name.rpartition(".")
    found = getattr(model.get_submodule(owner), leaf)
    assert isinstance(found, Tensor)
    return found


def owner_of(name: str, replaced: Container[str]) -> str | None:
    """The replaced module that a tensor belongs to, however deep inside."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in replaced:
            return name
    return None


def block_of(name: str) -> str:
    """The beginning of a name that ends with a block's number and a dot; empty outside of blocks."""
    found = _BLOCK.match(name)
    return found[0] if found else ""


def _stored(tensor: Tensor, storage_dtype: torch.dtype, name: str) -> Tensor:
    """A parameter in the dtype it is stored in; buffers stay as they are.

    Raises: CompressError when a value is not finite in that dtype.
    """
    if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
        return tensor.detach()
    return _checked(tensor.detach().to(storage_dtype), storage_dtype, name)


def _check_products(module: nn.Module, storage_dtype: torch.dtype, name: str) -> None:
    """That no weight which a loader multiplies out of codes and scales becomes infinite in the stored dtype.

    Raises: CompressError when one does.
    """
    for inner, part in quantized_linears(module).items():
        full = f"{name}.{inner}" if inner else name
        _checked(part.dense_weight().to(storage_dtype), storage_dtype, full)


def _checked(tensor: Tensor, storage_dtype: torch.dtype, name: str) -> Tensor:
    """The same tensor. Raises: CompressError when a value is not finite.

    Codes and scales of one byte are on a grid of their own; torch asks nothing of them.
    """
    if tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.isfinite().all():
        raise CompressError(
            "save.overflow",
            f"a weight overflows {storage_dtype}".replace("torch.", ""),
            where=name,
            fix="set `save.dtype` to bfloat16 or float32 and start over: scales are rounded to that dtype",
        )
    return tensor


def name_on_disk(model: PreTrainedModel, module: str) -> str:
    """What a checkpoint calls a linear."""
    found = _under_names_on_disk(model, {f"{module}.weight": torch.empty(0, device="meta")})
    return next(iter(found)).removesuffix(".weight")


def _under_names_on_disk(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers calls these tensors in a checkpoint: version 5 stores expert banks one expert at a time."""
    if TRANSFORMERS_MAJOR < 5:
        return tensors
    from transformers.core_model_loading import revert_weight_conversion

    renamed: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return renamed
