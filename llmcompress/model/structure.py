"""All experiments on one block of a model: its sites, input groups, folds and width groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmcompress.model.block_experiment import BlockExperiment, Observed, sizes
from llmcompress.model.channel_tracing import Channels, trace_channels
from llmcompress.model.exceptions import NEVER_EXECUTED, refusals
from llmcompress.model.folds import legal, linear_folds, norm_folds
from llmcompress.model.map import BlockStructure, Fold, InputGroup, Refusal, SiteInfo, WidthGroup
from llmcompress.model.shrink import can_shrink, kind_of
from llmcompress.model.skeleton import record
from llmcompress.model.widths import removable, width_group

_FEWEST_TOKENS, _MOST_TOKENS = 16, 1024
_SEQUENCE = 8
"""Tokens per sequence where attention between tokens matters."""

Blocks = Sequence[tuple[str, nn.Module]]
Group = list[str]
Item = TypeVar("Item")


@torch.no_grad()
def block_structure(model: PreTrainedModel, blocks: Blocks, index: int, token: int) -> BlockStructure:
    """The structure of block `index`, whose weights must be real; `token` is any id that the model embeds.

    A single token attends only to itself, so there attention passes its values through and queries and keys have no
    say: that is where channels are followed. Sequences then check folds and bring queries and keys into the units.
    """
    single = _experiment(model, blocks, index, token, length=1)
    sequence = _experiment(model, blocks, index, token, length=_SEQUENCE)
    base = single.base
    refused = refusals(single.block)
    kept = {refusal.name for refusal in refused}
    executed = [name for name in base.inputs if name in single.linears]
    refused += [Refusal(name, NEVER_EXECUTED) for name in single.linears if name not in executed and name not in kept]
    readers = _groups_by_input(base, executed)
    groups = [group for group in ([name for name in group if name not in kept] for group in readers) if group]
    folds, widths = _experiments(single, sequence, readers, groups)
    order = list(base.inputs)
    allowed = [fold for fold in folds if not kept.intersection(fold.consumers)]
    structure = BlockStructure(
        sites=tuple(_site(name, single.linears[name]) for group in groups for name in group),
        groups=tuple(InputGroup(tuple(group)) for group in groups),
        folds=tuple(sorted(_passing(allowed, partial(legal, sequence)), key=lambda fold: order.index(fold.producer))),
        width_groups=tuple(_passing(widths, partial(removable, sequence))),
        refused=tuple(refused),
    )
    return replace(structure, width_groups=tuple(_with_fixed_heads(sequence, structure)))


def _with_fixed_heads(sequence: BlockExperiment, structure: BlockStructure) -> Iterator[WidthGroup]:
    """Heads are tried by removing one: integers of attention count them, and of some models something else does too."""
    for index, group in enumerate(structure.width_groups):
        if kind_of(group) == "channels" or group.units == 1:
            yield group
            continue
        run = partial(sequence.call.run, sequence.block, sequence.hidden)
        yield replace(group, fixed=not can_shrink(sequence.block, structure, {index: range(1, group.units)}, run=run))


def _experiments(
    single: BlockExperiment, sequence: BlockExperiment, readers: list[Group], groups: list[Group]
) -> tuple[list[Fold], list[WidthGroup]]:
    """Candidates for folds and width groups."""
    folds, widths = norm_folds(single, readers), list[WidthGroup]()
    for stage in _stages(groups):
        names = [name for group in stage for name in group]
        channels = Channels(tuple((name, sizes(single.linears[name])[0]) for name in names))
        first = next(i for i, group in enumerate(readers) if stage[0][0] in group)
        later = [group for group in readers[first + 1 :] if not set(group).intersection(names)]
        links = trace_channels(single, channels, [group[0] for group in later])
        folds += linear_folds(channels, links, readers)
        members = {group[0]: group for group in later}
        found = (width_group(sequence, channels, link, members[link.reader]) for link in links)
        widths += [group for group in found if group is not None]
    return folds, widths


def _experiment(model: PreTrainedModel, blocks: Blocks, index: int, token: int, *, length: int) -> BlockExperiment:
    """The block with enough random hidden states that every expert is reached and no input channel is always zero."""
    generator = torch.Generator().manual_seed(0)
    tokens = _FEWEST_TOKENS
    while True:
        recording = record(model, blocks, torch.full((tokens // length, length), token))
        hidden = torch.randn(recording.hidden.shape, generator=generator)
        experiment = BlockExperiment(blocks[index][1], recording.calls[index], hidden)
        if tokens >= _MOST_TOKENS or (
            set(experiment.linears) <= set(experiment.base.inputs) and _all_alive(experiment)
        ):
            return experiment
        tokens *= 2


def _all_alive(experiment: BlockExperiment) -> bool:
    inputs = (experiment.base.rows_NI(name) for name in experiment.linears)
    seen = (x_NI.abs() > 0.01 * x_NI.square().mean().sqrt() for x_NI in inputs if x_NI is not None)
    return all(bool((alive_NI.sum(0) >= 2).all()) for alive_NI in seen)


def _passing(items: list[Item], test: Callable[[list[Item]], bool]) -> list[Item]:
    """The items that pass a test which many can take together; halved where they do not."""
    if not items or test(items):
        return items
    half = len(items) // 2
    return [] if not half else _passing(items[:half], test) + _passing(items[half:], test)


def _groups_by_input(base: Observed, linears: Sequence[str]) -> list[Group]:
    """Linears that read the very same tensor, in order of execution."""
    groups: dict[object, Group] = {}
    for name in linears:
        x = base.inputs[name]
        same = (x.data_ptr(), x.shape, x.stride(), x.storage_offset(), x.dtype)
        groups.setdefault(same, []).append(name)
    return list(groups.values())


def _stages(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups whose names differ in numbers only (the same linears of several experts) are tried together."""
    stages: dict[object, list[Group]] = {}
    for group in groups:
        stages.setdefault(tuple(_unnumbered(name) for name in group), []).append(group)
    return list(stages.values())


def _unnumbered(name: str) -> str:
    """`experts.7.up_proj` → `experts.#.up_proj`; `fc1` and the `2` of a Sequential's `mlp.2` stay."""
    *path, leaf = name.split(".")
    return ".".join([*("#" if part.isdigit() else part for part in path), leaf])


def _site(name: str, linear: nn.Module) -> SiteInfo:
    outputs, inputs = sizes(linear)
    return SiteInfo(name, outputs, inputs, linear.bias is not None, isinstance(linear, Conv1D))
