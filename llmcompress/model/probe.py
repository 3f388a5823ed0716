"""Maps a model by experiment on one random-weight block of each kind; no weights are read."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmcompress.errors import CompressError, is_out_of_memory
from llmcompress.model.block_experiment import LINEARS
from llmcompress.model.experts import unfuse_experts
from llmcompress.model.map import BlockInfo, BlockStructure, ModelMap, Refusal
from llmcompress.model.random_weights import materialise, release
from llmcompress.model.skeleton import find_blocks
from llmcompress.model.structure import block_structure
from llmcompress.modules.base import MODULES, CompressedModule
from llmcompress.modules.manifest import apply_manifest, changes


def probe(config: PretrainedConfig, *, unfuse: bool = False) -> ModelMap:
    """The map of the model that this config describes; `unfuse`: as it is with its experts taken apart.

    Raises: CompressError when transformers cannot build it as a causal language model or it has no list of blocks.
    """
    model = without_weights(config)
    if unfuse:
        unfuse_experts(model)
    return _probe(model)


def map_model(model: PreTrainedModel) -> ModelMap:
    """The map of a live model, whatever earlier passes made of it: experiments on random weights of its shapes.

    Raises: CompressError when its modules differ from its config in a way that nothing of ours explains.
    """
    meta_model = without_weights(model.config)
    found = changes(model, meta_model)
    # what has a stock format has the shape of the stock linear: for the map it is just that
    modules = {name: spec for name, spec in found.modules.items() if not _is_like_stock(MODULES[spec["type"]])}
    apply_manifest(meta_model, replace(found, modules=modules), torch.float32)
    _copy_indices(model, meta_model)
    tied = model.get_input_embeddings().weight is getattr(model.get_output_embeddings(), "weight", None)
    return replace(_probe(meta_model), tied=tied)


def _is_like_stock(kind: type[CompressedModule]) -> bool:
    return kind.has_stock_format and not kind.is_transparent


def _probe(model: PreTrainedModel) -> ModelMap:
    config = model.config
    blocks = find_blocks(model)
    embedding, head = _name_of(model, model.get_input_embeddings()), _name_of(model, model.get_output_embeddings())
    text = config.get_text_config()
    tied = bool(getattr(text, "tie_word_embeddings", False))
    refused = _refused_outside(model, blocks, embedding, head, tied=tied)
    rows = len(model.get_input_embeddings().weight)  # before a smaller table takes its place
    # A padding token would be masked or numbered in its own way by some models.
    token = 2 if getattr(text, "pad_token_id", None) == 1 else 1
    _furnish(model, [block for _, block in blocks], vocabulary=token + 1)
    structures: dict[object, BlockStructure] = {}
    for index, (_, block) in enumerate(blocks):
        kind = _kind(block)
        if kind not in structures:
            materialise(block)
            structures[kind] = block_structure(model, blocks, index, token)
            release(block)
    infos = tuple(BlockInfo(i, name, structures[_kind(block)]) for i, (name, block) in enumerate(blocks))
    return ModelMap(config.model_type, int(text.hidden_size), infos, embedding, head, tied, refused, rows)


def _copy_indices(model: nn.Module, meta_model: nn.Module) -> None:
    """Whole numbers (which rows are kept) say where values go, so experiments need the real ones."""
    for name, buffer in model.named_buffers():
        if not buffer.is_floating_point():
            owner, _, leaf = name.rpartition(".")
            with suppress(AttributeError):  # below a linear made of codes
                module = meta_model.get_submodule(owner)
                if leaf in module._buffers:
                    module._buffers[leaf] = buffer.detach().clone()


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """The model with its parameters on the meta device and its buffers (rotary tables) real."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    except Exception as error:  # whatever the values of a config.json make transformers stumble over
        if is_out_of_memory(error):
            raise
        raise CompressError(
            "model.not-causal-lm",
            f"transformers has no causal language model for {type(config).__name__}",
            where=str(error).splitlines()[0] if str(error) else "",
            fix="use a decoder-only model that AutoModelForCausalLM supports",
        ) from error
    return model.eval()


def _furnish(model: PreTrainedModel, blocks: Sequence[nn.Module], *, vocabulary: int) -> None:
    """Make everything real that runs outside the blocks, with a tiny embedding; the head never runs."""
    width = model.get_input_embeddings().embedding_dim  # one that is held as factors has no table
    model.set_input_embeddings(nn.Embedding(vocabulary, width))
    head = model.get_output_embeddings()
    materialise(model, skip=[*blocks, *([] if head is None else [head])])


def _refused_outside(
    model: PreTrainedModel, blocks: Sequence[tuple[str, nn.Module]], embedding: str, head: str, *, tied: bool
) -> tuple[Refusal, ...]:
    """The embedding, the head and any other linear that stands outside the blocks."""
    inside = tuple(f"{name}." for name, _ in blocks)
    rows = [Refusal(embedding, "embedding: kept in full precision")]
    if head:
        rows.append(Refusal(head, f"head: kept in full precision{f'; tied to {embedding}' if tied else ''}"))
    others = [
        Refusal(name, "outside the blocks: kept in full precision")
        for name, module in model.named_modules()
        if isinstance(module, LINEARS) and name != head and not name.startswith(inside)
    ]
    return (*rows, *others)


def _kind(block: nn.Module) -> object:
    """Blocks with the same modules and the same shapes are of one kind."""
    return tuple(
        (name, type(module), tuple((key, p.shape) for key, p in module.named_parameters(recurse=False)))
        for name, module in block.named_modules()
    )


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")
