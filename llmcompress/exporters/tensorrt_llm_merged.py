"""Linears that TensorRT-LLM merges while it loads: q, k, v and gate, up must be quantized alike."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmcompress.exporters.contents import Contents
from llmcompress.exporters.tensorrt_llm_config import Layers
from llmcompress.formats.tensorrt_llm import with_shared_scale
from llmcompress.modules.expression_leaves import Quantized

_MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_MERGED_IN_FILES = ("qkv_proj", "gate_up_proj")
_TWO_LEVELS = ("NVFP4", "W4A16_NVFP4")


def is_alone(name: str) -> bool:
    """Whether a linear is not merged with its neighbours."""
    return not any(name.rpartition(".")[2] in group for group in _MERGED)


def is_merged_in_files(name: str) -> bool:
    """Whether the family itself (Phi-3) stores merged matrices, which TensorRT-LLM splits while it loads."""
    return name.rpartition(".")[2] in _MERGED_IN_FILES


def merged_problems(contents: Contents, layers: Layers) -> dict[str, str]:
    """Name → why it cannot be merged with its neighbours."""
    found: dict[str, str] = {}
    for group in _groups(contents):
        names = ", ".join(name.rpartition(".")[2] for name in group)
        if len({layers.get(name) for name in group}) > 1:
            why = f"TensorRT-LLM merges {names} into one matrix: they need one scheme"
        elif not _share(contents, layers, group):
            why = f"TensorRT-LLM takes one second scale for {names}, and E4M3 cannot hold their scales exactly with one"
        elif not _same_inputs(contents, group):
            why = f"TensorRT-LLM takes one scale for the inputs of {names}, and theirs differ"
        else:
            continue
        found |= dict.fromkeys(group, why)
    return found


def rounded_again(contents: Contents, layers: Layers) -> dict[str, str]:
    """Name → what a loader does to FP8 weights of several scales; of a plan, whose scales are not known: to all."""
    found: dict[str, str] = {}
    for group in _groups(contents):
        if any(name not in layers or layers[name].algorithm != "FP8" for name in group):
            continue
        codes = _codes(contents, group)
        if len({float(form.tensor.scale) for form in codes}) > 1 or not codes:
            names = ", ".join(name.rpartition(".")[2] for name in group)
            why = (
                f"TensorRT-LLM merges {names} and rounds those whose scale is not the largest a second time, as with "
                "ModelOpt's own FP8; fp8_channel_a8token has a scale per row and is not rounded"
            )
            found |= dict.fromkeys(group, why)
    return found


def shared_scales(contents: Contents, layers: Layers) -> dict[str, Tensor]:
    """Of merged NVFP4 matrices the one number that all are divided by: that of the largest weights."""
    found: dict[str, Tensor] = {}
    for group in _groups(contents):
        if group[0] in layers and layers[group[0]].algorithm in _TWO_LEVELS:
            every = [form.tensor.shared_scale for form in _codes(contents, group)]
            scales = [each for each in every if each is not None]
            if scales:
                found |= dict.fromkeys(group, torch.stack(scales).amin(0))
    return found


def _share(contents: Contents, layers: Layers, group: tuple[str, ...]) -> bool:
    shared = shared_scales(contents, layers).get(group[0])
    codes = _codes(contents, group)
    return shared is None or all(with_shared_scale(form.tensor, shared) is not None for form in codes)


def _same_inputs(contents: Contents, group: tuple[str, ...]) -> bool:
    """FP8 loaders take the largest; all read the same input, so with one calibration they are equal."""
    scales = [form.input_scale for form in _codes(contents, group)]
    return len({float(scale) for scale in scales if scale is not None}) <= 1


def _groups(contents: Contents) -> Iterator[tuple[str, ...]]:
    """Neighbours, by full name, of which at least one is quantized."""
    linears, coded = set(contents.linears), {site.name for site in contents.sites}
    for leaves in _MERGED:
        for name in contents.linears:
            parent, _, leaf = name.rpartition(".")
            group = tuple(f"{parent}.{each}" for each in leaves)
            if leaf == leaves[0] and linears.issuperset(group) and not coded.isdisjoint(group):
                yield group


def _codes(contents: Contents, group: tuple[str, ...]) -> list[Quantized]:
    """None of a plan."""
    found = (contents.modules[name].expression() for name in group if name in contents.modules)
    return [form for form in found if isinstance(form, Quantized)]
