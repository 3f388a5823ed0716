"""Removes blocks from a model and renumbers the rest, which computes as if the removed ones had been skipped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmcompress.errors import CompressError
from llmcompress.model.facts import Facts
from llmcompress.model.layer_config import smaller_configs
from llmcompress.model.shrink import same
from llmcompress.model.skeleton import find_blocks, record
from llmcompress.model.stock import meta_model, reloaded
from llmcompress.modules.plain_attributes import plain_attributes

_TOKENS = 16
"""Enough for masks of different kinds of blocks to differ where windows are short."""

Named = Sequence[tuple[str, nn.Module]]


@torch.no_grad()
def drop_blocks(model: PreTrainedModel, indices: Collection[int]) -> None:
    """Remove the blocks with these indices, in place; works on compressed blocks too.

    Block numbers, the config and what the model notes about its blocks follow, so that key-value caches and saved
    folders are right. Every block that stays is checked: called by the smaller model, it must compute what it did.

    Raises: CompressError when no config describes the rest, or a block computes something else at its new place; the
    model is then as it was. ValueError for indices that do not exist, or when nothing would stay.
    """
    named = find_blocks(model)
    gone = set(indices)
    if not gone <= set(range(len(named))) or len(gone) == len(named):
        raise ValueError(f"of {len(named)} blocks {sorted(gone)} cannot be removed")
    if not gone:
        return
    kept = [index for index in range(len(named)) if index not in gone]
    plan = _plan(model, kept)
    before = _outputs(model, named, kept)
    undo = _carry_out(model, named, kept, plan)
    after = _outputs(model, find_blocks(model), range(len(kept)))
    wrong = [index for index, was, now in zip(kept, before, after, strict=True) if not same(now, was)]
    if wrong:
        for step in reversed(undo):
            step()
        raise CompressError(
            "depth.place-matters",
            f"block {wrong[0]} depends on its position: it computes something else once earlier blocks are removed",
            where=named[wrong[0]][0],
            fix="remove other blocks, or do not use `depth` on this model",
        )


@dataclass
class _Plan:
    """What changes besides the list of blocks."""

    config: PretrainedConfig
    numbers: frozenset[str]
    """Attributes that hold the number of the block they stand in."""
    outside: dict[tuple[str, str], Any] = field(default_factory=dict)
    """What modules outside the blocks note about them: module and attribute → new value."""


def _plan(model: PreTrainedModel, kept: Sequence[int]) -> _Plan:
    """The config whose stock model has exactly the kept blocks."""
    stock = meta_model(type(model), model.config)
    named = find_blocks(stock)
    numbers = _numbers([block for _, block in named])
    wanted = [_kind(named[index][1], numbers) for index in kept]
    outside = _outside_blocks(stock, named)
    for config in smaller_configs(model.config, kept, len(named)):
        try:
            smaller = meta_model(type(model), reloaded(config))
        except Exception:  # whatever a family raises about a config that contradicts itself
            continue
        blocks = find_blocks(smaller)
        rest = _outside_blocks(smaller, blocks)
        if rest.shapes == outside.shapes and [_kind(block, numbers) for _, block in blocks] == wanted:
            changed = {k: v for k, v in rest.attributes.items() if outside.attributes.get(k) != v}
            return _Plan(config, numbers, changed)
    raise CompressError(
        "depth.no-config",
        f"no {type(model.config).__name__} can describe this model without those blocks",
        where=f"remaining blocks: {', '.join(map(str, kept))}",
        fix="choose blocks so that the remaining ones still follow the family's pattern of block types",
    )


def _carry_out(model: PreTrainedModel, named: Named, kept: Sequence[int], plan: _Plan) -> list[Callable[[], None]]:
    """Change the model; the steps back."""
    undo: list[Callable[[], None]] = []

    def put(owner: object, name: str, value: Any) -> None:
        old = getattr(owner, name)
        undo.append(lambda: setattr(owner, name, old))
        setattr(owner, name, value)

    parent, _, leaf = named[0][0].rpartition(".")[0].rpartition(".")
    put(model.get_submodule(parent), leaf, nn.ModuleList(named[index][1] for index in kept))
    for new, index in enumerate(kept):
        for module in named[index][1].modules():
            for name in plan.numbers & vars(module).keys():
                put(module, name, new)
    for (name, attribute), value in plan.outside.items():
        if attribute in vars(model.get_submodule(name)):
            put(model.get_submodule(name), attribute, value)
    old = dict(vars(model.config.get_text_config()))
    changed = {k: v for k, v in vars(plan.config.get_text_config()).items() if k[0] != "_" and old.get(k) != v}
    for config in _configs(model):
        for key in changed.keys() & vars(config).keys():
            if vars(config)[key] == old.get(key):
                put(config, key, changed[key])
    return undo


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Every config object in use: the model's, its text part, and private ones of single modules."""
    found = [model.config, model.config.get_text_config()]
    found += [c for module in model.modules() if isinstance(c := getattr(module, "config", None), PretrainedConfig)]
    return list({id(config): config for config in found}.values())


def _numbers(blocks: Sequence[nn.Module]) -> frozenset[str]:
    """Attributes which, wherever they stand, hold the number of the block: `layer_idx` in most families."""
    seen: dict[str, set[tuple[int, int]]] = {}
    for index, block in enumerate(blocks):
        for module in block.modules():
            for name, value in plain_attributes(module).items():
                if type(value) is int:
                    seen.setdefault(name, set()).add((index, value))
    return frozenset(
        name for name, pairs in seen.items() if len(pairs) > 1 and all(index == value for index, value in pairs)
    )


def _kind(block: nn.Module, numbers: frozenset[str]) -> object:
    """What must be equal for two blocks to do the same with the same weights."""
    facts = Facts.of(block, frozenset())
    attributes = {key: value for key, value in facts.attributes.items() if key[1] not in numbers}
    return facts.shapes, attributes, [(name, type(module)) for name, module in block.named_modules()]


def _outside_blocks(model: nn.Module, named: Named) -> Facts:
    """The facts of everything that stands outside the blocks."""
    return Facts.of(model, frozenset(name for name, _ in named))


def _outputs(model: PreTrainedModel, named: Named, wanted: Sequence[int]) -> list[Tensor]:
    """What blocks give for one random hidden state, each called as the model calls it."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(embedding), (1, _TOKENS), generator=generator).to(embedding.device)
    try:
        recording = record(model, named, tokens)
        shape, like = recording.hidden.shape, recording.hidden
        hidden = torch.randn(shape, generator=generator).to(like.device, like.dtype)
        return [recording.calls[index].run(named[index][1], hidden.clone()) for index in wanted]
    finally:
        for module, was in training.items():
            module.training = was
