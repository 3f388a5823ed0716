"""CALDERA: codes plus a low-rank branch, in turns: each repairs what the other leaves. O = outputs, I = inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field, field_validator
from torch import Tensor

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.site import LinearSite
from llmcompress.modules.quant_linear import QuantLinear, codes_of
from llmcompress.modules.scheme import DESCRIPTION
from llmcompress.numerics.low_rank import relative_output_error
from llmcompress.numerics.statistics import Gram, Statistic
from llmcompress.passes.base import PASSES, Trait
from llmcompress.passes.decomposition.branch import Branch, branch, corrected_row, weight_only_scheme
from llmcompress.passes.nested_quantizer import quantizer_with
from llmcompress.passes.quantizing import QuantizingPass, dense_of
from llmcompress.records.rows import SiteReport


@PASSES.register("caldera")
class Caldera(QuantizingPass):
    """W ≈ Q + L R: the branch takes what codes cannot hold, the codes take the rest, over and over; the best is kept.

    The codes alone, and the codes alone with a branch for their error, are the first two candidates, so a site is
    never worse than gptq.

    Source: Saha et al., arXiv 2405.18886, Algorithm 1. Differs: Q comes from `gptq` on integer grids, not from a
    lattice; no Hadamard rotation.
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"codes", "factors"})
    conflicts: ClassVar[Mapping[Trait, str]] = {
        "zeros": "would fill zeros through its dense branch",
        "pattern": "would fill zeros through its dense branch",
    }

    sitewise: ClassVar[bool] = False

    scheme: str = Field("int2_g64", description=f"scheme of the codes: {DESCRIPTION}")
    rank: int = Field(64, ge=0, description="rank of the low-rank branch; 0: gptq alone")
    iterations: int = Field(10, ge=1, le=100, description="alternating updates of branch and codes")
    factor_scheme: str | None = Field(
        None, description="scheme of the factors, e.g. int8_channel; null: the model's dtype"
    )

    @field_validator("factor_scheme")
    @classmethod
    def _weights_only(cls, name: str | None) -> str | None:
        return weight_only_scheme(name)

    def needs(self) -> tuple[type[Statistic], ...]:
        """The Gram matrix of every input."""
        return (Gram, *self.activation_statistics())

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Find codes and branch of every site by itself."""
        rows = []
        for site in sites:
            if self.scheme_for(site.name, site.info.inputs):
                block.context.progress.substep(f"caldera {site.info.name}")
                rows.append(self.for_site(site.name)._compress(block, site))
        return rows

    def _compress(self, block: BlockWork, site: LinearSite) -> SiteReport:
        weight_OI, gram, dense = site.weight_OI, site.statistic(Gram), site.module
        gptq = quantizer_with({"gptq": {"on_indivisible": self.on_indivisible}}, self.scheme)

        def quantized(target_OI: Tensor) -> tuple[QuantLinear, SiteReport]:
            site.replace(dense)
            site.write(target_OI)
            (row,) = gptq.apply(block, [site])
            return codes_of(site.module), row

        base, base_row = quantized(weight_OI)
        least = relative_output_error(weight_OI, dense_of(base), gram.sum_II)
        best: Branch | None = None
        base_row = base_row.model_copy(update={"error": least})
        if self.rank and gram.tokens:
            codes, repair = base, self._branch(weight_OI, base, site)
            for turn in range(self.iterations + 1):
                error = relative_output_error(weight_OI, dense_of(codes) + repair.product(), gram.sum_II)
                if error < least:
                    base, best, least = codes, repair, error
                if turn < self.iterations:
                    # the first turn gives the branch the first word, as the paper does; later ones go on from there
                    start_OI = repair.product() if turn else self._branch(weight_OI, None, site).product()
                    codes, _ = quantized(weight_OI - start_OI)
                    repair = self._branch(weight_OI, codes, site)
        if best is None:
            site.replace(base)
            return base_row.model_copy(update={"algorithm": "caldera"})
        best.put(site, base)
        return corrected_row(site, "caldera", base_row, self.rank, self.factor_scheme, error=least, tokens=gram.tokens)

    def _branch(self, weight_OI: Tensor, base: QuantLinear | None, site: LinearSite) -> Branch:
        missing_OI = weight_OI if base is None else weight_OI - dense_of(base)
        gram = site.statistic(Gram)
        return branch(
            missing_OI, gram.sum_II, self.rank, scheme=self.factor_scheme, storage_dtype=site.storage_dtype, gram=gram
        )
