"""SparseGPT: prunes column by column and compensates each error in the remaining columns. O = outputs, I = inputs."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import NamedTuple

from pydantic import Field, field_validator
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.map import ModelMap
from llmcompress.model.site import LinearSite
from llmcompress.modules.scheme import DESCRIPTION, Scheme, named_scheme
from llmcompress.numerics.columns import (
    DropLowest,
    InverseFactor,
    RoundToGrid,
    block_length,
    inverse_factor,
    sweep_columns,
)
from llmcompress.numerics.grid import Fitted, output_error, restore, round_to_codes
from llmcompress.numerics.masks import count_of_zeros, lowest, lowest_per_group, zeros_first
from llmcompress.numerics.ranges import RangeSearch, fit
from llmcompress.numerics.repair import repair_kept
from llmcompress.numerics.statistics import AbsMax, Gram, Statistic
from llmcompress.passes.base import PASSES, BlockPass, Trait
from llmcompress.passes.baselines import with_options_of
from llmcompress.passes.pruning.sparse import SparsePass, magnitude_mask, sparsity
from llmcompress.passes.quantizing import put_codes, report_row
from llmcompress.passes.schemes import OnIndivisible, resolve_scheme, site_schemes
from llmcompress.records.rows import SiteReport


class _Pruned(NamedTuple):
    """New weights, their codes if quantized, and their squared output error if known."""

    weight_OI: Tensor
    codes: tuple[Tensor, Fitted] | None = None
    error: float | None = None


class _Tried(NamedTuple):
    """A candidate result, its relative output error, and the reason if it is a fallback."""

    pruned: _Pruned
    error: float
    degraded: str | None


@PASSES.register("sparsegpt")
class SparseGPT(SparsePass):
    """Second-order pruning, with `scheme` also quantization in the same sweep, on the inputs that the compressed model
    produces.

    Source: Frantar, Alistarh, arXiv 2301.00774. Differs: the sparsity is exact, ties included; kept weights are
    refitted once the mask is known (`numerics/repair.py`); with `scheme` each group's scales are fitted when it is
    reached; a site where the result is worse than the mask alone keeps the mask alone.
    """

    damping: float = Field(
        0.01, gt=0, le=1, description="damping of the Gram matrix (Hessian), as a fraction of its mean diagonal"
    )
    block: int = Field(128, ge=1, description="block size in columns, for ranking weights and for lazy updates")
    repair_steps: int = Field(
        2, ge=0, le=100, description="without a scheme: conjugate-gradient steps that refit the kept weights"
    )
    scheme: str | None = Field(None, description=f"also quantize, in the same sweep: {DESCRIPTION}")
    range: RangeSearch = Field("mse", description="with a scheme: range search, as in gptq")
    on_indivisible: OnIndivisible = Field(
        "error", description="with a scheme: inputs that do not divide into groups, as in gptq"
    )

    @field_validator("scheme")
    @classmethod
    def _known_scheme(cls, name: str | None) -> str | None:
        if name is not None and named_scheme(name).weights.scales.minima:
            raise ValueError(f"{name} has minima and no exact zero, which a mask needs: q3_k and q6_k have one")
        return None if name is None else named_scheme(name).name

    def traits(self) -> frozenset[Trait]:
        """Codes too, when it rounds."""
        return super().traits() | {"codes"} if self.scheme else super().traits()

    def check(self, model_map: ModelMap) -> None:
        """Whether every site divides into groups of its pattern and of its scheme.

        Raises: CompressError listing all that do not.
        """
        super().check(model_map)
        site_schemes([self], model_map)

    def needs(self) -> tuple[type[Statistic], ...]:
        """The Gram matrix of every input, and the largest input where activations get a fixed scale."""
        schemes = [self.scheme, *(options.get("scheme") for options in self.overrides.values())]
        static = any(name and named_scheme(name).measures_inputs for name in schemes)
        return (Gram, AbsMax) if static else (Gram,)

    @override
    def plain(self) -> Sequence[BlockPass]:
        """The smallest weights, then rounding to nearest."""
        if not self.scheme or AbsMax in self.needs():
            return super().plain()
        return (*super().plain(), with_options_of(self, "rtn", ("scheme", "on_indivisible")))

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Prune every site."""
        rows = []
        # sites that share an input stand together and share its matrix: it is factored once for all of them
        known: tuple[tuple[Gram, float], InverseFactor | None] | None = None
        for here, site, share in self.chosen(block, sites):
            block.context.progress.substep(f"sparsegpt {site.info.name}")
            key = (site.statistic(Gram), here.damping)
            if known is None or known[0] != key:
                known = (key, inverse_factor(key[0].sum_II, here.damping))
            rows.append(here._prune(site, share, known[1]))
        return rows

    def mask(self, weight_OI: Tensor, squares_I: Tensor, share: float) -> Tensor:
        """What would be dropped if nothing were repaired on the way."""
        score_OI = zeros_first(weight_OI.square() * squares_I, weight_OI)
        return (
            lowest_per_group(score_OI, self.zeros)
            if self.zeros
            else lowest(score_OI, count_of_zeros(share, score_OI.numel()))
        )

    def _prune(self, site: LinearSite, share: float, factor: InverseFactor | None) -> SiteReport:
        weight_OI, gram = site.weight_OI, site.statistic(Gram)
        scheme = resolve_scheme(self, site.name, site.info.inputs)
        signal = float(output_error(weight_OI, gram.sum_II)) or 1.0

        def tried(pruned: _Pruned, degraded: str | None) -> _Tried:
            error = pruned.error
            if error is None:
                error = float(output_error(pruned.weight_OI - weight_OI, gram.sum_II))
            return _Tried(pruned, error / signal, degraded)

        smallest = _masked(site, scheme, magnitude_mask(weight_OI, share, self.zeros))
        if factor is None:
            why = "no tokens reached it" if gram.tokens == 0 else "its Gram matrix is singular"
            best = baseline = tried(smallest, f"{why}: pruned by magnitude")
        else:
            raised = f"damping raised from {self.damping:g} to {factor.damping:g}"
            swept, mask_OI = self._sweep(site, scheme, share, factor)
            baseline = tried(smallest, "SparseGPT did worse than magnitude pruning: pruned by magnitude")
            best = tried(swept, raised if factor.damping > self.damping else None)
            if baseline.error < best.error:
                alone = tried(_masked(site, scheme, mask_OI), "refitting the kept weights did not help: not refitted")
                best = min(alone, baseline, key=lambda each: each.error)
        row = SiteReport(site=site.name, algorithm="sparsegpt")
        if scheme and best.pruned.codes:
            put_codes(site, scheme, *best.pruned.codes)
            row = report_row(site, scheme, "sparsegpt")
        else:
            site.write(best.pruned.weight_OI)
        return row.model_copy(
            update={
                "sparsity": sparsity(best.pruned.weight_OI),
                "error": best.error,
                "error_before": baseline.error,
                "tokens": gram.tokens,
                "degraded": best.degraded,
            }
        )

    def _sweep(
        self, site: LinearSite, scheme: Scheme | None, share: float, factor: InverseFactor
    ) -> tuple[_Pruned, Tensor]:
        """The pruned and repaired weights, and what was dropped."""
        weight_OI, gram_II = site.weight_OI, site.statistic(Gram).sum_II
        group = scheme.weights.span if scheme else None
        rounding = None
        if scheme:
            rounding = RoundToGrid(
                weight_OI,
                scheme.weights,
                scale_dtype=site.storage_dtype,
                search=self.range,
                gram_II=gram_II,
            )
        lazy = block_length(lcm(group or 1, self.zeros.of if self.zeros else 1), self.block)
        dropping = DropLowest(weight_OI, factor.upper_II, share=share, pattern=self.zeros, span=lazy, then=rounding)
        swept_OI = sweep_columns(weight_OI, factor.upper_II, dropping, block=lazy)
        mask_OI = dropping.zero_IO.T.contiguous()
        if rounding:
            codes = (rounding.codes_IO.T.contiguous(), rounding.fitted)
            return _Pruned(restore(*codes), codes), mask_OI
        repaired = repair_kept(weight_OI, swept_OI, ~mask_OI, gram_II, steps=self.repair_steps)
        return _Pruned(repaired.weight_OI, error=repaired.error), mask_OI


def _masked(site: LinearSite, scheme: Scheme | None, mask_OI: Tensor) -> _Pruned:
    """The mask and nothing else, rounded to nearest where there is a scheme."""
    masked_OI = site.weight_OI.masked_fill(mask_OI, 0.0)
    if scheme is None:
        return _Pruned(masked_OI)
    fitted = fit(masked_OI, scheme.weights, scale_dtype=site.storage_dtype)
    codes_OI = round_to_codes(masked_OI, fitted)
    return _Pruned(restore(codes_OI, fitted), (codes_OI, fitted))
