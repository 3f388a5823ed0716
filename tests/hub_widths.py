"""Maps of models at their real widths, in milliseconds: structure from a thin model, sizes from the config.

Experiments on real widths take seconds of CPU per block. Nothing about the structure depends on the width of a head or
on the number of FFN channels, so a thin model of the family tells it, and every unit found there stands for several.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmcompress.model.map import BlockStructure, ModelMap, WidthGroup, WidthPart
from llmcompress.model.probe import probe, without_weights
from llmcompress.model.shrink import kind_of

CONFIGS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "hub_configs.json").read_text())
"""Name on the Hub → what its config says of sizes."""

BLOCKS = 4
_THIN_HEAD = 8
_FEWEST_CHANNELS = 16
_NAMES = {
    "hidden": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "channels": ("intermediate_size", "ffn_dim"),
    "blocks": ("num_hidden_layers", "n_layer"),
}


def config_of(model: str) -> PretrainedConfig:
    """Of a model on the Hub, with four blocks."""
    return _config(model, {})


def hub_map(model: str) -> ModelMap:
    """What `probe` finds in it, folds left out."""
    sizes, real = CONFIGS[model], config_of(model)
    heads = int(_first(sizes, "heads"))
    head = int(sizes.get("head_dim", _first(sizes, "hidden") // heads))
    channels = int(_first(sizes, "channels") or 4 * _first(sizes, "hidden"))
    together = 1
    while channels % (2 * together) == 0 and channels // (2 * together) >= _FEWEST_CHANNELS:
        together *= 2
    thin: dict[str, Any] = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    thin[_name(real, "hidden")] = thin["hidden_size"] = heads * _THIN_HEAD
    if "head_dim" in sizes:
        thin["head_dim"] = _THIN_HEAD
    if "word_embed_proj_dim" in sizes:
        thin["word_embed_proj_dim"] = heads * _THIN_HEAD
    if _first(sizes, "channels"):
        thin[_name(real, "channels")] = channels // together
    else:
        together = _first(sizes, "hidden") // (heads * _THIN_HEAD)  # four times the width, in both
    found = probe(_config(model, thin))
    outline = without_weights(real)
    known: dict[int, BlockStructure] = {}
    blocks = []
    for block in found.blocks:
        structure = known.get(id(block.structure))
        if structure is None:
            structure = _wide(block.structure, outline, block.name, together, head // _THIN_HEAD)
            known[id(block.structure)] = structure
        blocks.append(replace(block, structure=structure))
    vocabulary = int(real.vocab_size)
    hidden = int(real.hidden_size)
    return replace(found, blocks=tuple(blocks), hidden_size=hidden, vocabulary=vocabulary)


def _config(model: str, changed: dict[str, Any]) -> PretrainedConfig:
    sizes = dict(CONFIGS[model])
    model_type = sizes.pop("model_type")
    blocks = "n_layer" if model_type in ("gpt2", "bloom") else "num_hidden_layers"
    thin = {name: value for name, value in changed.items() if name != "hidden_size" or "n_embd" not in sizes}
    return AutoConfig.for_model(model_type, **{**sizes, blocks: BLOCKS, **thin})


def _first(sizes: dict[str, Any], what: str) -> int:
    return next((int(sizes[name]) for name in _NAMES[what] if name in sizes), 0)


def _name(config: PretrainedConfig, what: str) -> str:
    own = config.to_dict()
    return next(name for name in reversed(_NAMES[what]) if name in own or name == _NAMES[what][0])


def _wide(thin: BlockStructure, outline: PreTrainedModel, block: str, channels: int, head: int) -> BlockStructure:
    """The same structure at the widths of the outline; a thin channel is `channels` real ones, a thin row `head`."""
    sites = []
    for site in thin.sites:
        module = outline.get_submodule(f"{block}.{site.name}")
        assert isinstance(module, nn.Linear | Conv1D)
        shape = module.weight.shape
        outputs, inputs = (shape[1], shape[0]) if isinstance(module, Conv1D) else (shape[0], shape[1])
        sites.append(replace(site, outputs=outputs, inputs=inputs))
    groups = tuple(
        _more_units(group, channels) if kind_of(group) == "channels" else _wider_units(group, head)
        for group in thin.width_groups
    )
    return replace(thin, sites=tuple(sites), width_groups=groups, folds=())


def _more_units(group: WidthGroup, times: int) -> WidthGroup:
    parts = tuple(
        WidthPart(
            part.site,
            part.axis,
            tuple(tuple(index * times + turn for index in unit) for unit in part.indices for turn in range(times)),
        )
        for part in group.parts
    )
    return WidthGroup(group.units * times, parts)


def _wider_units(group: WidthGroup, times: int) -> WidthGroup:
    parts = tuple(
        WidthPart(
            part.site,
            part.axis,
            tuple(tuple(index * times + turn for index in unit for turn in range(times)) for unit in part.indices),
        )
        for part in group.parts
    )
    return WidthGroup(group.units, parts)
