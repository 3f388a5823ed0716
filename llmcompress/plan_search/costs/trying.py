"""Finds what an option makes of a linear by doing it once, on one block of random weights.

For factors, low-rank branches and codebooks, of which no arithmetic tells the sizes. What data decide (ranks by energy)
is another on the real model: give such options fixed ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from typing_extensions import override

from llmcompress.calibration.context import RunContext
from llmcompress.exporters.base import Writing
from llmcompress.exporters.manifest import ManifestExporter
from llmcompress.exporters.shards import ShardSizes
from llmcompress.formats.named import Kind
from llmcompress.model.probe import map_model
from llmcompress.modules.base import CompressedModule
from llmcompress.modules.expression import Expression
from llmcompress.modules.expression_leaves import Dense, Leaf, Quantized
from llmcompress.passes.apply import apply_passes
from llmcompress.plan_search.costs.forms import DENSE, Form, Forms, Matrix
from llmcompress.plan_search.costs.small_models import random_windows, small_model
from llmcompress.plan_search.plan_space import PlanSpace


def forms_of(space: PlanSpace, config: PretrainedConfig, *, storage_dtype: torch.dtype) -> Forms:
    """Of all options of a space; those whose sizes no arithmetic tells are tried.

    `storage_dtype` is that of factors in the files. Raises: CompressError where an option cannot work on a block.
    """
    plain = Forms(space)
    tried: dict[tuple[str, str, str], Form] = {}
    for option in dict.fromkeys(option for option, _ in plain.unknown):
        for body in space.space.bodies:
            for form in _tried(plain, config, body, option, storage_dtype):
                tried[body, option, form.name] = form
    return Forms(space, tried)


def _tried(
    forms: Forms, config: PretrainedConfig, body: str, option: str, storage_dtype: torch.dtype
) -> Iterator[Form]:
    """Of the first block, and of all that are like it."""
    space = forms.space
    model = small_model(config, 1, space.space.bodies[body])
    context = RunContext(random_windows(), storage_dtype=storage_dtype)
    model = apply_passes(model, map_model(model), space.space.sites[option], context).model
    kinds = _Kinds("5GB")
    ManifestExporter().write(model, Path(), Writing(storage_dtype, sizes=kinds))
    first = space.model_map.blocks[0]
    for block in space.model_map.blocks:
        if block.structure is not first.structure:
            continue
        for site in forms.blocks[block.index, body].structure.sites:
            start = f"{first.full(site.name)}."
            tensors = {name.removeprefix(start): kind for name, kind in kinds.found.items() if name.startswith(start)}
            module = model.get_submodule(first.full(site.name))
            yield Form(site, block.full(site.name), tuple(_matrices(module)), tensors)


def _matrices(module: nn.Module) -> Iterator[Matrix]:
    if not isinstance(module, CompressedModule):
        assert isinstance(module.weight, Tensor)
        yield Matrix(*module.weight.shape)
        return
    for node in module.expression().nodes():
        if isinstance(node, Leaf):
            yield Matrix(*node.shape, _form(node))


def _form(leaf: Expression) -> str:
    if isinstance(leaf, Quantized):
        return leaf.scheme.name
    return DENSE if isinstance(leaf, Dense) else type(leaf).__name__.lower()


class _Kinds(ShardSizes):
    """Notes what would be written."""

    def __init__(self, max_shard_size: str) -> None:
        super().__init__(max_shard_size)
        self.found: dict[str, Kind] = {}

    @override
    def add(self, name: str, tensor: Tensor) -> None:
        self.found[name] = (tensor.dtype, tuple(tensor.shape))
        super().add(name, tensor)
