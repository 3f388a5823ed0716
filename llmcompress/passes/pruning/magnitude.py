"""Magnitude pruning: the smallest weights become zero; the baseline of all pruning methods. O = outputs, I = inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.site import LinearSite
from llmcompress.numerics.masks import count_of_zeros, lowest_counts
from llmcompress.numerics.statistics import Statistic
from llmcompress.passes.base import PASSES, BlockPass
from llmcompress.passes.pruning.sparse import SparsePass, magnitude_mask, sparsity
from llmcompress.passes.pruning.sparse_counts import shares_of
from llmcompress.records.rows import SiteReport


@PASSES.register("magnitude")
class Magnitude(SparsePass):
    """Zero the smallest weights of every site, of every row, or of all sites together.

    Source: Han et al., arXiv 1510.00149. Differs: pruned once, without training.
    """

    whole_block: ClassVar[frozenset[str]] = SparsePass.whole_block | {"comparison"}

    comparison: Literal["row", "layer", "global"] = Field(
        "layer", description="rank weights within each output row, within each site, or across all selected sites"
    )

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if self.zeros and self.comparison != "layer":
            raise ValueError(f"pattern {self.pattern} ranks weights within its groups: remove `comparison`")
        if self.comparison == "global" and self.allocation != "uniform":
            raise ValueError("`comparison: global` already allocates sparsity: `allocation` must be uniform")
        return self

    def needs(self) -> tuple[type[Statistic], ...]:
        """Nothing."""
        return ()

    def decide(self, whole: WholeModel) -> dict[str, Tensor]:
        """How many of the smallest weights each site contains."""
        if self.comparison != "global":
            return super().decide(whole)
        sites = [site for site in whole.sites() if self.selects(site.name) and not self.has_own_share(site.name)]

        def magnitudes() -> Iterator[Tensor]:
            return (site.weight_OI.abs() for site in sites)

        weights = sum(site.info.outputs * site.info.inputs for site in sites)
        counts = lowest_counts(magnitudes, count_of_zeros(self.target, weights))
        return shares_of(whole, {site.name: count for site, count in zip(sites, counts, strict=True)})

    @override
    def with_decisions(self, decisions: Mapping[str, Tensor]) -> Self:
        settled = super().with_decisions(decisions)
        return settled.model_copy(update={"comparison": "layer"}) if self.comparison == "global" else settled

    def mask(self, weight_OI: Tensor, squares_I: Tensor | None, share: float) -> Tensor:
        """The smallest weights, wherever they are compared."""
        return magnitude_mask(weight_OI, share, self.zeros, by_row=self.comparison == "row")

    @override
    def plain(self) -> Sequence[BlockPass]:
        """It is one."""
        return (self,)

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Zero them."""
        rows = []
        for here, site, share in self.chosen(block, sites):
            weight_OI = site.weight_OI
            pruned_OI = weight_OI.masked_fill(here.mask(weight_OI, None, share), 0.0)
            site.write(pruned_OI)
            rows.append(SiteReport(site=site.name, algorithm="magnitude", sparsity=sparsity(pruned_OI)))
        return rows
