"""A model with memory-mapped weights, which take no memory until they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from typing_extensions import override

from llmcompress.loading.quiet import quiet_transformers


class View(NamedTuple):
    """One matrix inside a tensor of three dimensions."""

    tensor: str
    first: int
    rows: slice


class MappedWeights(Mapping[str, Tensor]):
    """Every tensor under the name that transformers gives it, mapped anew each time it is asked for.

    A page that was read counts as memory in use until its tensor is dropped; one that was not counts as none.
    """

    def __init__(self, stored: OffloadedWeightsLoader, same: Mapping[str, str]) -> None:
        self._stored, self._same = stored, same
        self._views: dict[str, View] = {}

    def cut(self, views: Mapping[str, View]) -> None:
        """Further names, of parts of tensors."""
        self._views.update(views)

    def together(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several at once: parts of one tensor share its map, of which a process can have only so many."""
        whole: dict[str, Tensor] = {}
        found = {}
        for name in names:
            view = self._views.get(name)
            if view is None:
                found[name] = self[name]
                continue
            if view.tensor not in whole:
                whole[view.tensor] = self[view.tensor]
            found[name] = whole[view.tensor][view.first, view.rows]
        return found

    @override
    def __getitem__(self, name: str) -> Tensor:
        if name in self._views:
            return self.together([name])[name]
        stored_name = self._same.get(name, name)
        place = self._stored.index.get(stored_name, {})
        if "safetensors_file" not in place:
            converted: Tensor = self._stored[stored_name]
            return converted
        # not through the loader, which would cast, and so read, what has another dtype than most
        with safe_open(place["safetensors_file"], framework="pt") as file:
            found: Tensor = file.get_tensor(place.get("weight_name", stored_name))
            return found

    @override
    def __contains__(self, name: object) -> bool:
        return name in self._views or name in self._same or name in self._stored.index

    @override
    def __iter__(self) -> Iterator[str]:
        return iter([*self._stored, *self._same])

    @override
    def __len__(self) -> int:
        return len(self._stored) + len(self._same)


def map_weights(
    folder: Path, config: PretrainedConfig, scratch: Path, *, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, MappedWeights]:
    """The model of a checked folder with all its weights mapped, in the dtypes of the files; buffers are in memory.

    transformers says where each weight is, legacy names and all; what it must convert (experts that it joins) it
    writes to `scratch`, which must live as long as the model.
    """
    options: dict[str, Any] = {"config": config, "trust_remote_code": trust_remote_code}
    scratch.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        offloaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            # child by child: transformers 4 tries to open files on the device of a map for the whole model
            device_map={name: "disk" for name, _ in model.named_children()},
            offload_folder=str(scratch),
            **options,
        )
    model.tie_weights()
    weights = MappedWeights(_loader(offloaded), _tied(model))
    put_weights(model, weights)
    return model.eval().requires_grad_(False), weights


def put_weights(module: nn.Module, weights: MappedWeights, prefix: str = "") -> None:
    """Give every parameter, and every stored buffer, its mapped tensor; parameters that are one object stay one."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    names: dict[nn.Parameter, str] = {}
    for owner_name, owner in module.named_modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                names.setdefault(parameter, ".".join(filter(None, [prefix, owner_name, leaf])))
                places.setdefault(parameter, []).append((owner, leaf))
        for leaf, buffer in owner._buffers.items():
            name = ".".join(filter(None, [prefix, owner_name, leaf]))
            if buffer is not None and leaf not in owner._non_persistent_buffers_set and name in weights:
                owner._buffers[leaf] = weights[name].clone()
    tensors = weights.together(names.values())
    for parameter, found in places.items():
        mapped = nn.Parameter(tensors[names[parameter]], requires_grad=parameter.requires_grad)
        for owner, leaf in found:
            owner._parameters[leaf] = mapped


def _tied(model: nn.Module) -> dict[str, str]:
    """Every further name of a parameter → its first."""
    first: dict[int, str] = {}
    pairs = model.named_parameters(remove_duplicate=False)
    return {name: found for name, parameter in pairs if (found := first.setdefault(id(parameter), name)) != name}


def _loader(model: nn.Module) -> OffloadedWeightsLoader:
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if isinstance(hook, AlignDevicesHook) and hook.weights_map is not None:
            found: OffloadedWeightsLoader = getattr(hook.weights_map, "dataset", hook.weights_map)
            return found
    raise AssertionError("transformers put nothing on the disk")
