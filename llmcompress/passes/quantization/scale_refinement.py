"""Scale refinement: solves for the scales again, with the quantizer's codes fixed."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from torch import Tensor

from llmcompress.model.site import LinearSite
from llmcompress.modules.quant_linear import QuantLinear, codes_of
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.formats import STORED
from llmcompress.numerics.grid import Fitted
from llmcompress.numerics.scale_refinement import refine_scales
from llmcompress.numerics.statistics import Gram
from llmcompress.passes.base import PASSES
from llmcompress.passes.quantization.quantizer_wrapper import QuantizerWrapper
from llmcompress.passes.quantizing import relative_error
from llmcompress.records.rows import SiteReport


@PASSES.register("scale_refinement")
class ScaleRefinement(QuantizerWrapper):
    """Quantize with another pass, then refit group scales by least squares on the output; no row of a weight gets
    worse.

    Source: the scale step of Egiazarian et al., arXiv 2401.06118 (AQLM) and of Nagel et al., arXiv 2106.08295, section
    3; here in closed form on the Gram matrix, and rounded to the checkpoint's dtype during the search.
    """

    sweeps: int = Field(4, ge=0, le=100, description="rounds of coordinate descent over the scales")

    @model_validator(mode="after")
    def _free_scales(self) -> Self:
        for name in self.schemes():
            scales = named_scheme(name).weights.scales
            if scales != STORED or scales.single:
                raise ValueError(
                    f"the scales of {name} cannot be refined: use int…, fp8…, fp4… or nf4 by group or channel"
                )
        return self

    def improve(self, site: LinearSite, weight_OI: Tensor, row: SiteReport) -> SiteReport:
        """Solve for the scales of one site."""
        codes, gram = codes_of(site.module), site.statistic(Gram)
        fitted = Fitted.of_stored(codes.scheme.weights, codes.scale_OG.float(), codes.zero_OG, None)
        before = relative_error(weight_OI, codes.codes_OI, fitted, gram)
        refined = refine_scales(
            weight_OI, codes.codes_OI, fitted, gram.sum_II, scale_dtype=site.storage_dtype, sweeps=self.sweeps
        )
        better = QuantLinear.from_fitted(codes.scheme, codes.codes_OI, refined, site.bias_O, codes.input_scale)
        site.replace(better)
        error = relative_error(weight_OI, codes.codes_OI, refined, gram)
        told = {"algorithm": "scale_refinement", "error": error, "error_before": before, "tokens": gram.tokens}
        return row.model_copy(update=told)
