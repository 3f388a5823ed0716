"""Nested sub-networks: channels sorted by importance, so that a sub-network is the first of them; blocks skipped.

O = outputs, I = inputs, U = units.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.depth import drop_blocks
from llmcompress.model.infer_config import with_inferred_config
from llmcompress.model.map import ModelMap
from llmcompress.model.shrink import shrink_block
from llmcompress.model.site import LinearSite
from llmcompress.model.skeleton import HIDDEN_KEYWORD, find_blocks
from llmcompress.model.units import UnitGroup, groups_of, masked, unit_groups
from llmcompress.passes.pruning.scores.base import SCORES
from llmcompress.plan_search.plan_space import Plan, PlanSpace


@dataclass(frozen=True)
class SubNet:
    """One size of the model."""

    kept: Mapping[str, int] = field(default_factory=dict)
    """Group, by its reader's full name → its first so many channels; groups that are not named are whole."""
    skipped: frozenset[int] = frozenset()
    """Blocks that are left out."""


def subnet_of(space: PlanSpace, plan: Plan) -> SubNet:
    """The size that a plan's bodies and dropped blocks give; what it does to linears does not count.

    Raises: CompressError for a body that removes heads: only channels are nested.
    """
    kept: dict[str, int] = {}
    for index in space.bodies:
        unit = space.units[index]
        name = unit.options[plan[index]]
        for each in space.space.bodies.get(name, ()):
            for block in unit.blocks:
                for group in groups_of(space.model_map.blocks[block]):
                    info = group.block.structure.site(group.readers[0].removeprefix(f"{group.block.name}."))
                    share = each.kept_fraction(group.name, info, space.model_map)
                    if share < 1 and group.kind == "heads":
                        raise CompressError(
                            "search.supernet-heads",
                            f"`bodies: {name}` removes heads, and only channels of feed-forward networks are nested",
                            where=group.name,
                            fix="set `heads: false` in that pass, or judge without a supernet",
                            exit_code=ExitCode.USAGE,
                        )
                    if share < 1:
                        kept[group.name] = max(1, round(share * kept.get(group.name, group.units)))
    return SubNet(kept, space.dropped(plan))


def sort_channels(whole: WholeModel, *, score: str = "activation") -> None:
    """Put the channels of every feed-forward network in the order of their importance, the greatest first, in place.

    The model computes what it did: rows and columns move together.
    """
    groups = _channels(whole.map)
    table = SCORES[score](groups).measured(whole)
    sites = {site.name: site for site in whole.sites()}
    for group, row in zip(groups, table.rows, strict=True):
        order_U = row.loss_C.argsort(descending=True, stable=True)
        for part in group.parts:
            _permute(sites[group.block.full(part.site)], part.axis, part.indices, order_U.tolist())


def _channels(model_map: ModelMap) -> list[UnitGroup]:
    return [group for group in unit_groups(model_map) if group.kind == "channels"]


def _permute(site: LinearSite, axis: str, indices: Sequence[Sequence[int]], order: Sequence[int]) -> None:
    """Where unit u was, unit order[u] comes to stand."""
    to = [index for unit in range(len(order)) for index in indices[unit]]
    of = [index for unit in order for index in indices[unit]]
    weight_OI = site.weight_OI
    if axis == "columns":
        weight_OI[:, to] = weight_OI[:, of]
    else:
        weight_OI[to] = weight_OI[of]
        bias_O = site.bias_O
        if bias_O is not None:
            bias_O[to] = bias_O[of]
            site.write_bias(bias_O)
    site.write(weight_OI)


@contextmanager
def running_as(model: nn.Module, model_map: ModelMap, subnet: SubNet) -> Iterator[None]:
    """The model computes as that sub-network for as long as the context lasts; what is left out gets no gradient.

    Channels are masked and skipped blocks' outputs dropped, so it takes as long as the whole model.
    """
    groups = [group for group in _channels(model_map) if group.name in subnet.kept]
    device = next(model.parameters()).device
    masks = [(torch.arange(group.units, device=device) < subnet.kept[group.name]).float() for group in groups]
    with ExitStack() as stack:
        stack.enter_context(masked(model, groups, masks))
        for index in subnet.skipped:
            block = model.get_submodule(model_map.blocks[index].name)
            stack.callback(block.register_forward_hook(_skipped, with_kwargs=True).remove)
        yield


def sliced(model: PreTrainedModel, model_map: ModelMap, subnet: SubNet) -> PreTrainedModel:
    """The sub-network as an ordinary model of its own."""
    model = copy.deepcopy(model)
    for (_, block), info in zip(find_blocks(model), model_map.blocks, strict=True):
        keep = {group.index: range(subnet.kept[group.name]) for group in groups_of(info) if group.name in subnet.kept}
        shrink_block(block, info.structure, keep, run=None)
    drop_blocks(model, subnet.skipped)
    return with_inferred_config(model)


def _skipped(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = kwargs[HIDDEN_KEYWORD] if HIDDEN_KEYWORD in kwargs else args[0]
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])
