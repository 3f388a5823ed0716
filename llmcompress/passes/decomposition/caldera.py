"""CALDERA: codes plus a low-rank branch, optimized alternately. O = outputs, I = inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.formats.named import Kind
from llmcompress.model.map import SiteInfo
from llmcompress.model.site import LinearSite
from llmcompress.modules.quant_linear import codes_of
from llmcompress.modules.scheme import DESCRIPTION
from llmcompress.numerics.gptq import Visit, swept_codes
from llmcompress.numerics.grid import Fitted, Grid, output_error, restore
from llmcompress.numerics.low_rank import Factors, leading_factors, relative_output_error
from llmcompress.numerics.statistics import Gram, Statistic
from llmcompress.passes.base import PASSES, Trait
from llmcompress.passes.decomposition.branch import branch, corrected_row, corrected_tensors, weight_only_scheme
from llmcompress.passes.nested_quantizer import quantizer_with
from llmcompress.passes.quantizing import QuantizingPass, dense_of, put_codes
from llmcompress.passes.schemes import resolve_scheme
from llmcompress.records.rows import SiteReport


@PASSES.register("caldera")
class Caldera(QuantizingPass):
    """Approximate W by Q + L R, quantized weights plus a low-rank branch, with alternating updates; the best is kept.

    The first two candidates are plain gptq and gptq with a branch fitted to its error: no site is worse than gptq.

    Source: Saha et al., arXiv 2405.18886, Algorithm 1. Differs: Q comes from `gptq` on integer grids instead of a
    lattice; no Hadamard rotation; factors are rounded once, at the end, and updates stop when they gain little.
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

    @override
    def needs_plugin(self) -> bool:
        return any([self.rank, *(options.get("rank") for options in self.overrides.values())])

    @override
    def site_tensors(self, site: str, info: SiteInfo, found: Mapping[str, Kind], dtype: torch.dtype) -> dict[str, Kind]:
        """Codes and branch; a site that the branch does not help, or that data never reach, has codes alone."""
        here = self.for_site(site)
        if not here.rank or resolve_scheme(here, site, info.inputs) is None:
            return dict(found)
        return corrected_tensors(found, info, here.rank, here.factor_scheme, dtype)

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Find codes and branch of every site separately."""
        rows = []
        turns = self.iterations + 1
        for index, site in enumerate(sites):
            if self.scheme_for(site.name, site.info.inputs):

                def tell(turn: int, name: str = site.info.name, before: int = index * turns) -> None:
                    block.context.progress.substep(f"caldera {name}", done=before + turn, total=len(sites) * turns)

                rows.append(self.for_site(site.name)._compress(block, site, tell))
        return rows

    def _compress(self, block: BlockWork, site: LinearSite, tell: Callable[[int], None]) -> SiteReport:
        tell(0)
        weight_OI, gram, dense = site.weight_OI, site.statistic(Gram), site.module
        gptq = quantizer_with({"gptq": {"on_indivisible": self.on_indivisible}}, self.scheme)
        scheme = gptq.scheme_for(site.name, site.info.inputs)
        assert scheme is not None
        (row,) = gptq.apply(block, [site])
        base = codes_of(site.module)
        alone = relative_output_error(weight_OI, dense_of(base), gram.sum_II)
        row = row.model_copy(update={"algorithm": "caldera", "error": alone})
        if not self.rank or not gram.tokens:
            return row
        found = self._turns(weight_OI, dense_of(base), scheme.weights, site, tell)
        if found is not None:
            site.replace(dense)
            put_codes(site, scheme, *found)
        codes = codes_of(site.module)
        best = branch(
            weight_OI - dense_of(codes),
            gram.sum_II,
            self.rank,
            scheme=self.factor_scheme,
            storage_dtype=site.storage_dtype,
            gram=gram,
        )
        error = relative_output_error(weight_OI, dense_of(codes) + best.product(), gram.sum_II)
        if error >= alone:
            site.replace(base)
            return row
        best.put(site, codes)
        return corrected_row(site, "caldera", row, self.rank, self.factor_scheme, error=error, tokens=gram.tokens)

    def _turns(
        self, weight_OI: Tensor, base_OI: Tensor, grid: Grid, site: LinearSite, tell: Callable[[int], None]
    ) -> tuple[Tensor, Fitted] | None:
        """The codes to which a branch adds most; None: those that are there already, which stand for `base_OI`.

        The branch is not rounded meanwhile, and no more exact than it must be: only the last one is.
        """
        gram, rank = site.statistic(Gram), min(self.rank, *weight_OI.shape)
        visit = Visit.of(gram.sum_II, damping=_DAMPING, act_order=True)
        if visit.factor is None:
            return None

        def error_with(dense_OI: Tensor, start_OR: Tensor | None) -> tuple[float, Factors]:
            factors = leading_factors(weight_OI - dense_OI, gram.sum_II, rank, start_OR)
            return float(output_error(weight_OI - dense_OI - factors.product(), gram.sum_II)), factors

        least, _ = error_with(base_OI, None)
        best, before = None, math.inf
        # the first turn gives the branch the first word, as the paper does; later ones go on from there
        factors = leading_factors(weight_OI, gram.sum_II, rank)
        for turn in range(1, self.iterations + 1):
            tell(turn)
            target_OI = weight_OI - factors.product()
            swept = swept_codes(target_OI, grid, gram.sum_II, visit, scale_dtype=site.storage_dtype)
            error, factors = error_with(restore(swept.codes_OI, swept.fitted).float(), factors.left_OR)
            if error < least:
                best, least = (swept.codes_OI, swept.fitted), error
            if error > (1 - _WORTH) * before:
                break
            before = error
        return best


_DAMPING = 0.01
"""As gptq has it."""
_WORTH = 0.01
"""By which a turn must lower the error for another one to be worth its time (docs/decisions/0030)."""
