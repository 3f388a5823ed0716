"""Wanda: prunes by weight magnitude times input norm. O = outputs, I = inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.site import LinearSite
from llmcompress.numerics.masks import zeros_first
from llmcompress.numerics.statistics import Sketch, SquaredNorm, Statistic
from llmcompress.passes.base import PASSES
from llmcompress.passes.pruning.sparse import SparsePass, lowest_scores, magnitude_mask, sparsity
from llmcompress.records.rows import SiteReport


@PASSES.register("wanda")
class Wanda(SparsePass):
    """Zero the weights with the lowest |w| · ‖x‖ in every output row, or in the site; the others do not change.

    Errors in the report are estimates (`Sketch`): the Gram matrix for exact ones would cost more than everything else.

    Source: Sun et al., arXiv 2306.11695.
    """

    whole_block: ClassVar[frozenset[str]] = SparsePass.whole_block | {"comparison"}

    comparison: Literal["row", "layer"] = Field(
        "row", description="rank weights within each output row, or within each site"
    )

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if self.zeros and self.comparison != "row":
            raise ValueError(f"pattern {self.pattern} ranks weights within its groups: remove `comparison`")
        return self

    def needs(self) -> tuple[type[Statistic], ...]:
        """Norms of the inputs, and what errors are estimated from."""
        return (SquaredNorm, Sketch)

    def mask(self, weight_OI: Tensor, squares_I: Tensor, share: float) -> Tensor:
        """The lowest scores of every group of the pattern, of every row, or of the site."""
        score_OI = zeros_first(weight_OI.abs() * squares_I.sqrt(), weight_OI)
        return lowest_scores(score_OI, share, self.zeros, by_row=self.comparison == "row")

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Zero them; by magnitude alone where no token came."""
        rows = []
        for here, site, share in self.chosen(block, sites):
            block.context.progress.substep(f"wanda {site.info.name}")
            rows.append(here._drop(site, share))
        return rows

    def _drop(self, site: LinearSite, share: float) -> SiteReport:
        weight_OI, norm = site.weight_OI, site.statistic(SquaredNorm)
        smallest_OI = magnitude_mask(weight_OI, share, self.zeros)
        mask_OI = self.mask(weight_OI, norm.sum_I, share) if norm.tokens else smallest_OI
        pruned_OI = weight_OI.masked_fill(mask_OI, 0.0)
        site.write(pruned_OI)
        row = SiteReport(site=site.name, algorithm="wanda", sparsity=sparsity(pruned_OI), tokens=norm.tokens)
        if not norm.tokens:
            return row.model_copy(update={"degraded": "no tokens reached it: pruned by magnitude"})
        sketch = site.statistic(Sketch)
        signal = sketch.output_error(weight_OI) or 1.0
        error, before = (sketch.output_error(weight_OI * each) / signal for each in (mask_OI, smallest_OI))
        return row.model_copy(update={"error": error, "error_before": before})
