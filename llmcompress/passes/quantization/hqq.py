"""HQQ: rounding to nearest with scales and zero points from a half-quadratic solver, without data."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, field_validator

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.site import LinearSite
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.half_quadratic import half_quadratic_fit
from llmcompress.numerics.statistics import Statistic
from llmcompress.passes.base import PASSES
from llmcompress.passes.quantizing import QuantizingPass, put_codes, report_row
from llmcompress.records.rows import SiteReport


@PASSES.register("hqq")
class HalfQuadratic(QuantizingPass):
    """Round to nearest on a grid whose scales and zero points keep most weights nearly exact and tolerate outliers.

    Source: Badri and Shaji, 2023 (HQQ). Differs: see `numerics/half_quadratic.py`.
    """

    scheme: str = Field("int4_g64_asym", description="int{2…8}_{gN|channel}[_asym|_positive][_a8token|_a8tensor]")
    power: float = Field(0.7, gt=0, le=1, description="norm exponent p: below 1, a few large errors are tolerated")
    steps: int = Field(20, ge=1, le=200, description="iterations of the half-quadratic solver")

    @field_validator("scheme")
    @classmethod
    def _integers(cls, name: str) -> str:
        if named_scheme(name).weights.number is not None:
            raise ValueError(f"hqq searches zero points, which only integer schemes have: {name!r} has none")
        return name

    def needs(self) -> tuple[type[Statistic], ...]:
        """Nothing, unless activations are static."""
        return self.activation_statistics()

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Solve and round every site separately."""
        rows = []
        for site in sites:
            scheme = self.scheme_for(site.name, site.info.inputs)
            if scheme is None:
                continue
            here, weight_OI = self.for_site(site.name), site.weight_OI
            fitted = half_quadratic_fit(
                weight_OI, scheme.weights, scale_dtype=site.storage_dtype, power=here.power, steps=here.steps
            )
            put_codes(site, scheme, round_to_codes(weight_OI, fitted), fitted)
            rows.append(report_row(site, scheme, "hqq"))
        return rows
