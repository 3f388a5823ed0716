"""Puts an ordinary model together from levels, in the order in which a recipe would have made it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.depth import drop_blocks
from llmcompress.model.infer_config import with_inferred_config
from llmcompress.model.probe import map_model
from llmcompress.model.skeleton import find_blocks, put_module
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import Pass
from llmcompress.plan_search.levels.decoded import DecodedLevels
from llmcompress.plan_search.levels.path import Step
from llmcompress.plan_search.plan_space import PlanSpace


@torch.no_grad()
def assemble(
    model: PreTrainedModel, path: Sequence[Step], levels: DecodedLevels, after: Sequence[Pass], context: RunContext
) -> PreTrainedModel:
    """A copy of the dense model, given as `model`, becomes the candidate."""
    named = find_blocks(model)
    for step in path:
        _, block = named[step.block]
        stored = levels.stored(step.block)
        stored.body(step.body).put(block)
        for site, option in zip(stored.sizes(step.body), step.options, strict=True):
            owner = stored.owner(step.body, site)
            difference = stored.level(owner, site, option)
            if difference:
                put_module(block, site, difference.module(block.get_submodule(site)))
    drop_blocks(model, set(range(len(named))) - {step.block for step in path})
    model = with_inferred_config(model)
    if after:
        return apply_passes(model, map_model(model), after, context).model
    return model


def is_table(space: PlanSpace, after: str) -> bool:
    """Whether the choice changes embedding and head alone, so that blocks can be run without it."""
    passes = space.space.after[after]
    return bool(passes) and all(each.traits() == {"tables"} for each in passes)


def with_tables(whole: WholeModel, passes: Sequence[Pass]) -> PreTrainedModel:
    """The model after passes that change tables; tensors of blocks are shared."""
    inside: Any = (block for _, block in find_blocks(whole.model))
    shared = chain.from_iterable((*block.parameters(), *block.buffers()) for block in inside)
    model = copy.deepcopy(whole.model, {id(tensor): tensor for tensor in shared})
    context = replace(whole.context, keep=None, state=None)
    device = next(model.parameters()).device
    return apply_passes(model.to("cpu"), whole.map, passes, context).model.to(device)
