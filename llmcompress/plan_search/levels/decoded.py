"""Blocks of candidates, ready to run: decoded weights are kept as long as there is room."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llmcompress.calibration.whole import WholeModel
from llmcompress.model.skeleton import find_blocks, put_module
from llmcompress.modules.base import CompressedModule
from llmcompress.plan_search.levels.block_levels import StoredBlock
from llmcompress.plan_search.levels.byte_cache import ByteCache
from llmcompress.plan_search.levels.difference import sharing
from llmcompress.plan_search.levels.path import Step
from llmcompress.plan_search.levels.store import LevelStore


@dataclass(frozen=True, eq=False)
class Shell:
    """A block with some body, in which linears are exchanged."""

    module: nn.Module
    dense: dict[str, nn.Module]
    """Its own linears, by site."""


class DecodedLevels:
    """The levels of one dense model, or of what a choice of `before` made of it; its blocks stay as they are."""

    def __init__(self, whole: WholeModel, store: LevelStore, before: int, cache: ByteCache[nn.Module | Shell]) -> None:
        self._map, self._store, self._before, self._cache = whole.map, store, before, cache
        self._blocks = [block for _, block in find_blocks(whole.model)]

    @torch.no_grad()
    def block(self, step: Step) -> nn.Module:
        """The block of that step; the next call for the same block and body changes the same module."""
        shell = self.shell(step.block, step.body)
        for site, option in zip(self._map.blocks[step.block].structure.sites, step.options, strict=True):
            put_module(shell.module, site.name, self.linear(step.block, step.body, site.name, option))
        return shell.module

    def shell(self, block: int, body: str) -> Shell:
        """The block with that body and its own linears."""
        key = (self._before, block, body)
        found = self._cache.get(key)
        if isinstance(found, Shell):
            return found
        module = sharing(self._blocks[block])
        difference = self.stored(block).body(body)
        difference.put(module)
        dense = {site.name: module.get_submodule(site.name) for site in self._map.blocks[block].structure.sites}
        held = sum(tensor.numel() for tensor in difference.tensors.values()) * 4
        shell = Shell(module, dense)
        self._cache.put(key, shell, held)
        return shell

    def linear(self, block: int, body: str, site: str, option: str) -> nn.Module:
        """What stands at the site: an ordinary linear with decoded weights where that computes the same."""
        stored = self.stored(block)
        owner = stored.owner(body, site)
        key = (self._before, block, owner, site, option)
        found = self._cache.get(key)
        if isinstance(found, nn.Module):
            return found
        dense = self.shell(block, owner).dense[site]
        difference = stored.level(owner, site, option)
        if not difference:
            return self.shell(block, body).dense[site]
        module = _decoded(difference.module(dense))
        return self._add(key, module)

    def stored(self, block: int) -> StoredBlock:
        """What the store holds of the block."""
        return self._store.block(block, before=self._before)

    def _add(self, key: object, module: nn.Module) -> nn.Module:
        held = sum(each.numel() * each.element_size() for each in (*module.parameters(), *module.buffers()))
        self._cache.put(key, module, held)
        return module


def _decoded(module: nn.Module) -> nn.Module:
    """An ordinary linear where the module computes what one matrix does."""
    if not isinstance(module, CompressedModule):
        return module
    expression = module.expression()
    if not expression.is_linear:
        return module
    bias_O = expression.dense_bias()
    linear = nn.Linear(module.in_features, module.out_features, bias=bias_O is not None, device="meta")
    linear.weight = nn.Parameter(expression.dense_weight().detach(), requires_grad=False)
    if bias_O is not None:
        linear.bias = nn.Parameter(bias_O.detach(), requires_grad=False)
    return linear.eval()
