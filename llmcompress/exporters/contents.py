"""What exporters know of a model: predicted by a plan or found in a live model, in the same form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmcompress.exporters.cache_scheme import cache_scheme
from llmcompress.exporters.config import spelled_for_both
from llmcompress.exporters.loader import Loader, linears_of_loader, merges_on_load
from llmcompress.model.map import ModelMap
from llmcompress.model.stock import stock_model
from llmcompress.modules.base import MODULES, CompressedModule
from llmcompress.modules.expression import Gather
from llmcompress.modules.manifest import Manifest, changes
from llmcompress.modules.quant_linear import QuantLinear, quantized_linears
from llmcompress.modules.scheme import Scheme

EXPERTS = "experts"
"""transformers 5 recognises experts by this word in a name."""


@dataclass(frozen=True)
class CodedLinear:
    """A linear that is, or will be, quantized."""

    name: str
    """Full."""
    scheme: Scheme
    outputs: int
    inputs: int
    has_bias: bool = False
    is_linear: bool = True
    """Loaders build an `nn.Linear` there, not a Conv1D."""
    packable: bool = True
    """And no subclass of it."""


@dataclass(frozen=True)
class Contents:
    """A model as exporters see it."""

    sites: tuple[CodedLinear, ...] = ()
    linears: tuple[str, ...] = ()
    """Full names of all linears, dense ones too."""
    merges_experts: bool = False
    """Loaders join experts of the checkpoint into banks."""
    banks: tuple[str, ...] = ()
    """Experts in such a bank that are no longer ordinary linears."""
    storage_dtype: torch.dtype | None = None
    """None: not known yet."""
    differences: Manifest = field(default_factory=Manifest)
    """From the stock model. A plan does not know them."""
    modules: Mapping[str, CompressedModule] = field(default_factory=dict)
    """Modules that replace a stock module, without their parts; those inside a wrapped module too. Not known to a plan
    either."""
    named_caches: frozenset[str] = frozenset()
    """Attentions with a quantized KV cache that compressed-tensors can represent."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The model's, with every setting spelled for both majors of transformers."""
    rounded_embedding: CodedLinear | None = None
    """Where a plan rounds it; found in a model it is among the sites and the differences."""
    planned_modules: tuple[str, ...] = ()
    """Names of the passes of a plan that leave modules of ours; found in a model these are among the differences."""

    @property
    def is_stock(self) -> bool:
        """Whether ordinary weights are all there is."""
        return not (self.sites or self.differences or self.planned_modules) and self.rounded_embedding is None

    @property
    def tables(self) -> tuple[CodedLinear, ...]:
        """Embeddings that are, or will be, codes."""
        if self.rounded_embedding is not None:
            return (self.rounded_embedding,)
        found = (site for site in self.sites if site.name in self.modules)
        return tuple(site for site in found if isinstance(self.modules[site.name].expression(), Gather))

    @property
    def rearranged(self) -> tuple[str, ...]:
        """Ordinary modules of other sizes or with something around them: no config describes those."""
        wrapped = (name for name, module in self.modules.items() if module.wraps_original)
        return (*wrapped, *self.differences.shapes, *self.differences.attributes)

    @property
    def more_than_quantized(self) -> tuple[str, ...]:
        """Everything that is not a quantized linear of stock size."""
        found = self.differences
        other = (name for name, spec in found.modules.items() if not MODULES[spec["type"]].has_stock_format)
        named = (name for name in other if name not in self.named_caches)
        rounded = () if self.rounded_embedding is None else (self.rounded_embedding.name,)
        return (*rounded, *self.planned_modules, *named, *found.reshaped, *found.shapes, *found.attributes)


def planned_contents(
    model_map: ModelMap, schemes: Mapping[str, Scheme], loader: Loader, storage_dtype: torch.dtype | None
) -> Contents:
    """What a model will hold whose sites (full names) are quantized by these schemes."""
    sites = tuple(
        CodedLinear(
            name := block.full(site.name),
            schemes[name],
            site.outputs,
            site.inputs,
            has_bias=site.has_bias,
            is_linear=not site.transposed,
            packable=not site.transposed and name not in loader.subclassed,
        )
        for block in model_map.blocks
        for site in block.structure.sites
        if block.full(site.name) in schemes
    )
    experts = tuple(site.name for site in sites if EXPERTS in site.name) if loader.merges_experts else ()
    return Contents(sites, model_map.site_names(), loader.merges_experts, experts, storage_dtype, config=loader.config)


def contents_in(model: PreTrainedModel, storage_dtype: torch.dtype) -> Contents:
    """What a finished model holds."""
    found = changes(model, stock_model(model))
    # experts that stayed ordinary linears are stored under the names of the stock bank
    dense = {name for name, part in compressed_modules(model).items() if part.is_transparent and part.is_dense()}
    found = replace(found, modules={name: spec for name, spec in found.modules.items() if name not in dense})
    classes = linears_of_loader(model)
    codes = quantized_linears(model)
    caches = cache_scheme(model)
    return Contents(
        tuple(_coded(name, site, classes.get(name, nn.Linear)) for name, site in codes.items()),
        tuple(name for name, part in model.named_modules() if isinstance(part, nn.Linear) or name in codes),
        merges_on_load(model),
        tuple(name for name, spec in found.modules.items() if MODULES[spec["type"]].is_transparent),
        storage_dtype,
        found,
        _outermost(model),
        frozenset(caches.attentions if caches else ()),
        spelled_for_both(model.config),
    )


def compressed_modules(model: nn.Module) -> dict[str, CompressedModule]:
    """Full name → every replaced module, parts of others too."""
    return {name: part for name, part in model.named_modules() if isinstance(part, CompressedModule)}


def _outermost(model: nn.Module) -> dict[str, CompressedModule]:
    found: dict[str, CompressedModule] = {}
    for name, module in compressed_modules(model).items():
        around = (other for other, outer in found.items() if not outer.wraps_original)
        if not module.is_transparent and not any(name.startswith(f"{other}.") for other in around):
            found[name] = module
    return found


def _coded(name: str, site: QuantLinear, loader_class: type[nn.Module]) -> CodedLinear:
    return CodedLinear(
        name,
        site.scheme,
        site.out_features,
        site.in_features,
        has_bias=site.bias is not None,
        is_linear=issubclass(loader_class, nn.Linear),
        packable=loader_class is nn.Linear,
    )
