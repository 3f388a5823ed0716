"""Weight sharing: all weights of a matrix take one of a few k-means levels. O = outputs, I = inputs, L = levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.map import ModelMap, SiteInfo
from llmcompress.model.site import LinearSite
from llmcompress.modules.codebook_linear import CodebookLinear
from llmcompress.numerics.codebook import nearest_level, shared_levels
from llmcompress.numerics.low_rank import relative_output_error
from llmcompress.numerics.packing import packed_bytes
from llmcompress.numerics.statistics import Gram, Statistic
from llmcompress.passes.base import PASSES, BlockPass, Trait
from llmcompress.records.rows import SiteReport

_WIDTH_BITS = 8
"""What the module notes for every column."""


@PASSES.register("kmeans")
class WeightSharing(BlockPass):
    """Share weights: k-means clusters of all weights of a matrix, of which a codebook of `2 ** bits` levels is stored.

    Zeros that an earlier pass made stay zero: they have a level of their own. Codes are then so unequally frequent that
    an entropy coder gains much: `export: [archive]`. No stock format can represent such a matrix: the result loads only
    after `import llmcompress`. Levels can be trained afterwards (`recover` with scales), as in the paper.

    Source: Han et al., arXiv 1510.00149 (Deep Compression), section 3. Differs: a weight may count by the squared
    inputs it meets (`weighted`).
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"codes"})

    bits: int = Field(4, ge=1, le=8, description="bits of a code: the codebook of a matrix has 2 ** bits levels")
    weighted: bool = Field(
        True, description="a weight counts by the mean square of its input; false: all weights alike, as in the paper"
    )

    def kept_fraction(self, site: str, info: SiteInfo, model_map: ModelMap) -> float:
        """As if what stays were of 16 bits."""
        return self.for_site(site).bits / 16

    def needs(self) -> tuple[type[Statistic], ...]:
        """The Gram matrix: squared inputs from its diagonal, errors from all of it."""
        return (Gram,)

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Every site by itself."""
        rows = []
        for site in sites:
            block.context.progress.substep(f"kmeans {site.info.name}")
            rows.append(self.for_site(site.name)._share(site))
        return rows

    def _share(self, site: LinearSite) -> SiteReport:
        weight_OI, gram = site.weight_OI, site.statistic(Gram)
        squares_I = gram.sum_II.diagonal() if gram.tokens and self.weighted else None
        # rounded before codes are chosen: these are the levels that will be stored
        levels_1L = _levels(weight_OI, 1 << self.bits, squares_I).to(site.storage_dtype).float()
        codes_IO = nearest_level(weight_OI.T.reshape(1, -1), levels_1L).view(weight_OI.T.shape)
        inputs, outputs = codes_IO.shape
        none = weight_OI.new_empty(0)
        width_I = torch.full((inputs,), self.bits, device=weight_OI.device)
        places = torch.empty(0, dtype=torch.long, device=weight_OI.device)
        site.replace(CodebookLinear.from_codes(codes_IO, width_I, {self.bits: levels_1L}, places, none, site.bias_O))
        stored = inputs * (8 * packed_bytes(outputs, self.bits) + _WIDTH_BITS)
        stored += levels_1L.numel() * torch.finfo(site.storage_dtype).bits
        return SiteReport(
            site=site.name,
            algorithm="kmeans",
            bits_per_weight=stored / weight_OI.numel(),
            error=relative_output_error(weight_OI, site.weight_OI, gram.sum_II) if gram.tokens else None,
            tokens=gram.tokens,
            degraded="no tokens reached it: all inputs are weighted equally"
            if self.weighted and not gram.tokens
            else None,
        )


def _levels(weight_OI: Tensor, count: int, squares_I: Tensor | None) -> Tensor:
    """1×L, rising; where there are zeros, one level is zero."""
    kept_OI = weight_OI != 0
    counts_N = None if squares_I is None else squares_I.expand_as(weight_OI)[kept_OI]
    values_N = weight_OI[kept_OI]
    if not len(values_N):
        return weight_OI.new_zeros(1, count)
    if len(values_N) == weight_OI.numel():
        return shared_levels(values_N, count, counts_N)
    found_1L = shared_levels(values_N, count - 1, counts_N)
    return torch.cat([found_1L, found_1L.new_zeros(1, 1)], 1).sort(1).values
