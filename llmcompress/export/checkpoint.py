"""A live model as an ordinary Hugging Face checkpoint: its tensors under their names on disk, one block at a time."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmcompress.calibration.homes import Home, InMemory
from llmcompress.errors import CompressError
from llmcompress.export.base import Loader
from llmcompress.export.shards import ShardWriter
from llmcompress.loading.versions import TRANSFORMERS_MAJOR
from llmcompress.modules.quant_linear import QuantLinear

Replaced = Mapping[str, Callable[[], dict[str, Tensor]]]
"""Full name of a module that looks different on disk → its tensors there, under names relative to the module."""


_BLOCK = re.compile(r".*?\.\d+\.")


def quantized_sites(model: nn.Module) -> dict[str, QuantLinear]:
    """Full name → module of everything that holds codes."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def loader_of(config: PretrainedConfig) -> Loader:
    """What stock transformers will do with a model of this configuration, found without its weights."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    linears = linears_of_loader(skeleton)
    subclassed = (name for name, kind in linears.items() if issubclass(kind, nn.Linear) and kind is not nn.Linear)
    return Loader(merges_on_load(skeleton), frozenset(subclassed))


def linears_of_loader(model: PreTrainedModel) -> dict[str, type[nn.Module]]:
    """Name → class of every linear (or Conv1D) that stock transformers builds for this configuration.

    The live model cannot say: its linears are replaced, and a replacement forgets the layout of a Conv1D.
    """
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    return {name: type(part) for name, part in skeleton.named_modules() if isinstance(part, (nn.Linear, Conv1D))}


def merges_on_load(model: PreTrainedModel) -> bool:
    """Whether transformers joins several weights of the checkpoint into one parameter while loading.

    Version 5 does so for banks of experts, and for a compressed-tensors folder it then expects codes there
    (`CompressedTensorsDequantize`): one whose experts are ordinary weights does not load.
    """
    if TRANSFORMERS_MAJOR < 5:
        return False
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(rule, WeightConverter) for rule in get_model_conversion_mapping(model, add_legacy=False))


def write_model(
    model: PreTrainedModel,
    folder: Path,
    config: Mapping[str, Any],
    replaced: Replaced,
    *,
    storage_dtype: torch.dtype,
    max_shard_size: str,
    home: Home | None = None,
) -> tuple[tuple[str, ...], int]:
    """Write weights and `config.json`; the names of the weight files and the bytes of all tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, max_shard_size)
    for name, tensor in _tensors_on_disk(model, replaced, storage_dtype, home or InMemory()):
        writer.add(name, tensor)
    files = writer.close()
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return files, writer.tensor_bytes


def _tensors_on_disk(
    model: PreTrainedModel, replaced: Replaced, storage_dtype: torch.dtype, home: Home
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint, converted one block at a time; of tied tensors only the first name."""
    begun: set[str] = set()
    repeated = _repeated(model)
    for prefix, names in groupby(list(model.state_dict()), key=_block_of):
        block: dict[str, Tensor] = {}
        for name in names:
            owner = _owner(name, replaced)
            if owner is not None:
                if owner not in begun:
                    begun.add(owner)
                    block |= {f"{owner}.{part}": value for part, value in replaced[owner]().items()}
            elif name not in repeated:
                block[name] = _stored(_tensor(model, name), storage_dtype, name)
        yield from _under_names_on_disk(model, block).items()
        if prefix:
            home.leave(prefix.removesuffix("."), model.get_submodule(prefix.removesuffix(".")))


def _repeated(model: nn.Module) -> set[str]:
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


def _owner(name: str, replaced: Replaced) -> str | None:
    """The replaced module that a tensor belongs to, however deep inside."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in replaced:
            return name
    return None


def _block_of(name: str) -> str:
    found = _BLOCK.match(name)
    return found[0] if found else ""


def _stored(tensor: Tensor, storage_dtype: torch.dtype, name: str) -> Tensor:
    """A parameter in the dtype it is stored in; buffers stay as they are.

    Raises: CompressError when a value is not finite in that dtype.
    """
    if not isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
        return tensor.detach()
    cast = tensor.detach().to(storage_dtype)
    if not cast.isfinite().all():
        raise CompressError(
            "save.overflow",
            f"a weight does not fit into {storage_dtype}".replace("torch.", ""),
            where=name,
            fix="set `save.dtype` to bfloat16 or float32",
            saved="all finished blocks: run again with another dtype",
        )
    return cast


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
