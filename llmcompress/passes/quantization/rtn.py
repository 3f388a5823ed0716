"""Round to nearest: the baseline of all quantizers, without data."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.site import LinearSite
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.ranges import RangeSearch, fit
from llmcompress.numerics.statistics import Statistic
from llmcompress.passes.base import PASSES, BlockPass
from llmcompress.passes.quantizing import QuantizingPass, put_codes, report_row
from llmcompress.records.rows import SiteReport


@PASSES.register("rtn")
class RoundToNearest(QuantizingPass):
    """Every weight becomes the nearest value of its group's grid.

    Source: Jacob et al., arXiv 1712.05877.
    """

    range: RangeSearch = Field(
        "minmax",
        description="mse: clip each group's range to minimize the squared error; joint: also search signs or zero "
        "points; minmax: cover all values",
    )

    def needs(self) -> tuple[type[Statistic], ...]:
        """Nothing, unless activations are static."""
        return self.activation_statistics()

    def plain(self) -> Sequence[BlockPass]:
        """It is one."""
        return (self,)

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Round every site separately."""
        rows = []
        for site in sites:
            scheme = self.scheme_for(site.name, site.info.inputs)
            if scheme is None:
                continue
            weight_OI = site.weight_OI
            search = self.for_site(site.name).range
            fitted = fit(weight_OI, scheme.weights, scale_dtype=site.storage_dtype, search=search)
            put_codes(site, scheme, round_to_codes(weight_OI, fitted), fitted)
            rows.append(report_row(site, scheme, "rtn"))
        return rows
