"""About how many bytes levels will take, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from llmcompress.model.map import BlockInfo, SiteInfo
from llmcompress.passes.base import BlockPass, Pass
from llmcompress.passes.pruning.sparse import SparsePass
from llmcompress.passes.quantizing import QuantizingPass
from llmcompress.plan_search.levels.encoding import packed_bits
from llmcompress.plan_search.plan_space import PlanSpace


def estimated_bytes(space: PlanSpace, storage_dtype: torch.dtype) -> int:
    """Codes, scales, factors, masks with what they keep, and the linears that bodies change.

    Models after choices of `before` are counted as large as the dense one's linears.
    """
    stored = torch.finfo(storage_dtype).bits
    blocks = space.model_map.blocks
    of_levels = sum(_of_block(space, info, stored) for info in blocks)
    dense = sum(site.outputs * site.inputs * stored for info in blocks for site in info.structure.sites)
    changing = sum(bool(passes) for passes in space.space.before.values())
    return math.ceil((len(space.space.before) * of_levels + changing * dense) / 8)


def _of_block(space: PlanSpace, info: BlockInfo, stored: int) -> float:
    total = 0.0
    for passes in space.space.bodies.values():
        for site, is_changed, is_same in _narrowed(space, info, passes):
            total += site.outputs * site.inputs * stored if is_changed else 0
            if not (passes and is_same):
                options = space.space.sites.values()
                total += sum(_of_option(space, info, site, option, stored) for option in options)
    return total


def _narrowed(space: PlanSpace, info: BlockInfo, passes: Sequence[Pass]) -> Iterator[tuple[SiteInfo, bool, bool]]:
    """Every site with about its size in that body; whether it is changed; whether its levels are those of the first."""
    reached = False
    for group in info.structure.groups:
        kept = {name: _kept(space, info, info.structure.site(name), passes) for name in group.sites}
        changed = {name for name, fraction in kept.items() if fraction < 1}
        for name in group.sites:
            site = info.structure.site(name)
            yield (
                replace(site, outputs=math.ceil(site.outputs * kept[name])),
                name in changed,
                not (reached or name in changed),
            )
        reached = reached or bool(changed)


def _kept(space: PlanSpace, info: BlockInfo, site: SiteInfo, passes: Sequence[Pass]) -> float:
    name = info.full(site.name)
    return math.prod(each.kept_fraction(name, site, space.model_map) for each in passes if each.selects(name))


def _of_option(space: PlanSpace, info: BlockInfo, site: SiteInfo, passes: Sequence[Pass], stored: int) -> float:
    """Bits of one level; of its passes the last says in which form it is stored."""
    name, weights = info.full(site.name), site.outputs * site.inputs
    selecting = [each for each in passes if isinstance(each, BlockPass) and each.selects(name)]
    if not selecting:
        return 0.0
    last = selecting[-1]
    if isinstance(last, QuantizingPass):
        scheme = last.scheme_for(name, site.inputs)
        if scheme is None:
            return 0.0
        codes = packed_bits(math.ceil(scheme.weights.own_bits)) * weights
        return float(codes + scheme.weights.scale_bits(site.outputs, site.inputs, stored))
    kept = math.prod(each.kept_fraction(name, site, space.model_map) for each in selecting)
    zeros = [each.for_site(name).target for each in selecting if isinstance(each, SparsePass)]
    if zeros:
        return (kept * (1 - max(zeros)) * stored + 1) * weights
    return kept * weights * stored
