"""Weight sharing: all weights of a matrix take one of a few k-means levels. O = outputs, I = inputs, L = levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.map import ModelMap, SiteInfo
from llmcompress.model.site import LinearSite
from llmcompress.modules.codebook_linear import CodebookLinear
from llmcompress.numerics.codebook import nearest_level, shared_levels, swept_levels
from llmcompress.numerics.gptq import Visit
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
    after `import llmcompress`. Levels can be trained afterwards, as in the paper (`recover` with `train:
    norms_and_scales`).

    Source: Han et al., arXiv 1510.00149 (Deep Compression), section 3; weighted and entropy-constrained k-means: Choi
    et al., arXiv 1612.01543, sections 3 and 4. Differs: codes are chosen column by column, each error pushed onto the
    columns still to come, as in `gptq` (`assignment`).
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"codes"})

    bits: int = Field(4, ge=1, le=8, description="bits of a code: the codebook of a matrix has 2 ** bits levels")
    weighted: bool = Field(
        False, description="a weight counts by the mean square of its input; false: all weights alike, as in the paper"
    )
    entropy: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="entropy-constrained k-means: what a bit of an entropy-coded code costs, beside a relative squared "
        "error of 1; spreads levels more evenly, so that an archive is smaller at the same error",
    )
    assignment: Literal["gptq", "nearest"] = Field(
        "gptq",
        description="gptq: levels are assigned column by column and errors compensated in the columns still to come; "
        "nearest: every weight takes the nearest level, as in the paper",
    )
    damping: float = Field(
        0.01, gt=0, le=1, description="for gptq: damping of the Hessian, as a fraction of its mean diagonal"
    )

    def kept_fraction(self, site: str, info: SiteInfo, model_map: ModelMap) -> float:
        """As if what stays were of 16 bits."""
        return self.for_site(site).bits / 16

    def needs(self) -> tuple[type[Statistic], ...]:
        """The Gram matrix: squared inputs from its diagonal, errors and their compensation from all of it."""
        return (Gram,)

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Every site by itself; those that share an input share the factor of its matrix."""
        rows = []
        known: tuple[Gram, float] | None = None
        visit: Visit | None = None
        for site in sites:
            here, gram = self.for_site(site.name), site.statistic(Gram)
            block.context.progress.substep(f"kmeans {site.info.name}")
            if here.assignment == "gptq" and known != (gram, here.damping):
                known, visit = (gram, here.damping), Visit.of(gram.sum_II, damping=here.damping, act_order=True)
            rows.append(here._share(site, visit if here.assignment == "gptq" else None))
        return rows

    def _share(self, site: LinearSite, visit: Visit | None) -> SiteReport:
        weight_OI, pruned_OI, gram = site.weight_OI, site.pruned_OI, site.statistic(Gram)
        squares_I = gram.sum_II.diagonal() if gram.tokens and self.weighted else None
        # rounded before codes are chosen: these are the levels that will be stored
        levels_1L = self._levels(weight_OI, squares_I, pruned_OI).to(site.storage_dtype).float()
        found = _assigned(weight_OI, levels_1L, gram, visit, pruned_OI)
        inputs, outputs = found.codes_IO.shape
        none = weight_OI.new_empty(0)
        width_I = torch.full((inputs,), self.bits, device=weight_OI.device)
        places = torch.empty(0, dtype=torch.long, device=weight_OI.device)
        site.replace(
            CodebookLinear.from_codes(found.codes_IO, width_I, {self.bits: levels_1L}, places, none, site.bias_O)
        )
        stored = inputs * (8 * packed_bytes(outputs, self.bits) + _WIDTH_BITS)
        stored += levels_1L.numel() * torch.finfo(site.storage_dtype).bits
        unweighted = "no tokens reached it: all inputs are weighted equally" if squares_I is None else None
        return SiteReport(
            site=site.name,
            algorithm="kmeans",
            bits_per_weight=stored / weight_OI.numel(),
            error=found.error,
            error_before=found.error_of_nearest,
            tokens=gram.tokens,
            degraded=found.degraded or (unweighted if self.weighted else None),
        )

    def _levels(self, weight_OI: Tensor, squares_I: Tensor | None, pruned_OI: Tensor) -> Tensor:
        """1×L, rising; where weights are pruned, one level is zero."""
        kept_OI, count = ~pruned_OI, 1 << self.bits
        counts_N = None if squares_I is None else squares_I.expand_as(weight_OI)[kept_OI]
        values_N = weight_OI[kept_OI]
        if not len(values_N):
            return weight_OI.new_zeros(1, count)
        if len(values_N) == weight_OI.numel():
            return shared_levels(values_N, count, counts_N, entropy=self.entropy)
        found_1L = shared_levels(values_N, count - 1, counts_N, entropy=self.entropy)
        return torch.cat([found_1L, found_1L.new_zeros(1, 1)], 1).sort(1).values


class _Assigned(NamedTuple):
    """Codes, their relative output error and that of the nearest levels where it was measured, and why a fallback."""

    codes_IO: Tensor
    error: float | None = None
    error_of_nearest: float | None = None
    degraded: str | None = None


def _assigned(weight_OI: Tensor, levels_1L: Tensor, gram: Gram, visit: Visit | None, pruned_OI: Tensor) -> _Assigned:
    """The codes of the sweep, or the nearest ones where there is no sweep or it errs more."""
    nearest_IO = nearest_level(weight_OI.T.reshape(1, -1), levels_1L).view(weight_OI.T.shape)
    if not gram.tokens:
        why = None if visit is None else "no tokens reached it: every weight has the nearest level"
        return _Assigned(nearest_IO, degraded=why)

    def error(codes_IO: Tensor) -> float:
        return relative_output_error(weight_OI, levels_1L[0][codes_IO.long()].T, gram.sum_II)

    plain = error(nearest_IO)
    if visit is None:
        return _Assigned(nearest_IO, plain)
    if visit.factor is None:
        why = "its Gram matrix is singular: every weight has the nearest level"
        return _Assigned(nearest_IO, plain, degraded=why)
    swept_IO = swept_levels(weight_OI, levels_1L, visit, pruned_OI)
    swept = error(swept_IO)
    if swept > plain:
        why = "compensating errors did worse than the nearest levels: every weight has the nearest level"
        return _Assigned(nearest_IO, plain, plain, why)
    return _Assigned(swept_IO, swept, plain)
