"""RPTQ: channels with similar ranges are clustered, and each cluster has a static activation scale. O = outputs, I =
inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.map import WidthGroup, WidthPart
from llmcompress.model.site import LinearSite
from llmcompress.modules.low_rank import linear_of
from llmcompress.modules.transformed_input import ClusteredInput
from llmcompress.numerics.clusters import Clusters, Range, cluster, grid_of, round_by_clusters
from llmcompress.numerics.sample import InputSample
from llmcompress.numerics.statistics import Statistic
from llmcompress.passes.base import PASSES, BlockPass, Trait
from llmcompress.records.rows import SiteReport


@dataclass(frozen=True)
class _Plan:
    """Sites that share an input, and the clusters of its channels."""

    sites: tuple[LinearSite, ...]
    clusters: Clusters
    folded: bool
    """Whether the producers were permuted, so that the channels come in their new order by themselves."""


@PASSES.register("reorder")
class Reorder(BlockPass):
    """Quantize activations with one static scale per cluster of channels; weights are left to a later quantizer.

    The producer of the channels is permuted where the map proves that nothing else reads them (inside the FFN);
    elsewhere the module gathers its input, and the order of the residual stream does not change. W4A8 is `reorder:
    {bits: 8}`, then `gptq: {scheme: int4_channel}`, which sees the quantized activations.

    Source: Yuan et al. (RPTQ), arXiv 2304.01089. Differs: clusters are grown, not drawn (see `numerics/clusters.py`);
    ranges are the extremes of the calibration text; queries, keys and the cache are not quantized.
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"ranges"})
    conflicts: ClassVar[Mapping[Trait, str]] = {
        "pattern": "would move columns out of their N:M groups",
        "ranges": "would quantize activations a second time",
    }
    changes_sites: ClassVar[bool] = True

    clusters: int = Field(
        32,
        ge=1,
        description="channel clusters per input, one scale each; sites that share an input use the first site's",
    )
    bits: int | None = Field(
        8, ge=2, le=8, description="bits of the quantized inputs; null: only reorder, which is exact"
    )

    @override
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Range, InputSample)

    @override
    def names_after(self, site: str) -> tuple[str, ...]:
        """The linear after the quantization."""
        return (f"{site}.kept",)

    @override
    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Cluster every input, permute producers where that is legal, then put the rounding before the linears."""
        dense = {site.name for site in sites if not site.is_compressed}
        plans = []
        for group in block.input_groups():
            members = tuple(site for site in group if site.name in dense)
            if members:
                measured = members[0].statistic(Range)
                found = cluster(measured.low_I, measured.high_I, self.for_site(members[0].name).clusters)
                whole = len(members) == len(group)
                plans.append(_Plan(members, found, whole and _fold(block, members, found.order_I, dense)))
        return [self._put(site, plan) for plan in plans for site in plan.sites]

    def _put(self, site: LinearSite, plan: _Plan) -> SiteReport:
        bits = self.for_site(plan.sites[0].name).bits
        order_I = plan.clusters.order_I
        weight_OI = site.weight_OI if plan.folded else site.weight_OI[:, order_I]
        scale_K, zero_K = grid_of(plan.clusters, bits or 8, site.storage_dtype)
        module = ClusteredInput(
            linear_of(weight_OI.contiguous(), site.bias_O),
            sizes=plan.clusters.sizes,
            bits=bits,
            scale_K=scale_K,
            zero_K=zero_K,
            index_I=None if plan.folded else order_I,
        )
        sample_KI = site.statistic(InputSample).rows_KI[:, order_I]
        site.replace(module)
        tokens = site.statistic(Range).tokens
        return SiteReport(
            site=site.name,
            algorithm="reorder",
            error=None if bits is None else _error(sample_KI, weight_OI, plan.clusters, bits, site.storage_dtype),
            error_before=None if bits is None else _error(sample_KI, weight_OI, _one(plan), bits, site.storage_dtype),
            tokens=tokens,
            score=float(len(plan.clusters.sizes)),
            degraded=None if tokens else "no tokens reached it: its activations are not quantized",
        )


def _one(plan: _Plan) -> Clusters:
    """All channels on one grid."""
    clusters = plan.clusters
    return Clusters(
        torch.zeros_like(clusters.member_I), clusters.low_K.amin().reshape(1), clusters.high_K.amax().reshape(1)
    )


def _error(x_KI: Tensor, weight_OI: Tensor, clusters: Clusters, bits: int, scale_dtype: torch.dtype) -> float:
    """Squared error of the outputs ÷ squared outputs, of inputs and columns in the new order."""
    member_I = clusters.member_I.sort(stable=True).values
    scale_K, zero_K = grid_of(clusters, bits, scale_dtype)
    rounded_KI = round_by_clusters(x_KI, scale_K[member_I], zero_K[member_I], bits)
    signal = float((x_KI @ weight_OI.T).square().sum())
    return float(((rounded_KI - x_KI) @ weight_OI.T).square().sum()) / signal if signal else 0.0


def _fold(block: BlockWork, readers: Sequence[LinearSite], order_I: Tensor, dense: set[str]) -> bool:
    """Permute the units of the FFN that these sites read the inside of, if all its linears may be touched."""
    names = {site.info.name for site in readers}
    for group in block.info.structure.width_groups:
        columns = [part for part in group.parts if part.axis == "columns"]
        if {part.site for part in columns} != names:
            continue
        sites = [block.site(part.site) for part in group.parts]
        of_unit = _column_of_unit(columns)
        if of_unit is None or len(of_unit) != len(order_I) or not all(site.name in dense for site in sites):
            return False
        _permute(block, group, _unit_order(of_unit, order_I.tolist()))
        return True
    return False


def _column_of_unit(columns: Sequence[WidthPart]) -> list[int] | None:
    """The one column that every unit has, the same in all readers; None where units are more than that."""
    indices = {part.indices for part in columns}
    if len(indices) != 1:
        return None
    (units,) = indices
    found = [unit[0] for unit in units if len(unit) == 1]
    return found if len(found) == len(units) and sorted(found) == list(range(len(found))) else None


def _unit_order(column_of_unit: Sequence[int], order_I: Sequence[int]) -> list[int]:
    """Which old unit takes the place of each, when column c becomes the old column order[c]."""
    unit_of_column = {column: unit for unit, column in enumerate(column_of_unit)}
    return [unit_of_column[order_I[column]] for column in column_of_unit]


def _permute(block: BlockWork, group: WidthGroup, order: Sequence[int]) -> None:
    for part in group.parts:
        site = block.site(part.site)
        to = [index for unit in part.indices for index in unit]
        come = [index for unit in order for index in part.indices[unit]]
        weight_OI, bias_O = site.weight_OI, site.bias_O
        if part.axis == "columns":
            weight_OI[:, to] = weight_OI[:, come]
        else:
            weight_OI[to] = weight_OI[come]
            if bias_O is not None:
                bias_O[to] = bias_O[come]
                site.write_bias(bias_O)
        site.write(weight_OI)
