"""GPTQ: round columns one by one and push each error onto the columns still to come. O = outputs, I = inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.site import LinearSite
from llmcompress.numerics.columns import (
    DropWeights,
    InverseFactor,
    RoundToGrid,
    block_length,
    inverse_factor,
    sweep_columns_,
)
from llmcompress.numerics.grid import Fitted, Grid, round_to_codes
from llmcompress.numerics.ranges import RangeSearch, fit
from llmcompress.numerics.statistics import Gram, Statistic
from llmcompress.passes.base import PASSES
from llmcompress.passes.quantizing import QuantizingPass, put_codes, relative_errors, report_row
from llmcompress.records.rows import SiteReport


@dataclass(frozen=True)
class _Visit:
    """In which order the columns of an input are visited (None: as they stand), and the factor for that order."""

    order_I: Tensor | None
    visit_I: Tensor
    factor: InverseFactor | None


@PASSES.register("gptq")
class GPTQ(QuantizingPass):
    """Second-order rounding on the inputs that the compressed model itself produces.

    Source: Frantar et al., arXiv 2210.17323, Algorithm 1. Differs: scales of a group are fitted from weights
    corrected up to that very column, and their ranges shrink where that lowers the output error (docs/log.md);
    a site where the sweep ends worse than plain rounding keeps plain rounding.
    """

    whole_block: ClassVar[frozenset[str]] = frozenset({"true_sequential"})

    damping: float = Field(0.01, gt=0, le=1, description="damping of the Hessian, as a fraction of its mean diagonal")
    block: int = Field(128, ge=1, description="columns per lazy update")
    act_order: bool = Field(
        True, description="activation order: quantize columns by descending input energy, with scales fitted in advance"
    )
    true_sequential: bool = Field(
        False, description="recalibrate after every group of sites that share an input (true sequential)"
    )
    range: RangeSearch = Field(
        "mse", description="mse: clip ranges to minimize the output error; minmax: cover all values"
    )

    def needs(self) -> tuple[type[Statistic], ...]:
        """The Gram matrix of every input."""
        return (Gram, *self.activation_statistics())

    def forwards(self) -> int:
        """One, or one for each input of a usual block."""
        return 4 if self.true_sequential else super().forwards()

    def run(self, block: BlockWork) -> list[SiteReport]:
        """As usual, or one input group after the other, each measured on what the earlier ones became."""
        if not self.true_sequential:
            return super().run(block)
        rows: list[SiteReport] = []
        for group in block.input_groups():
            sites = [site for site in group if self.selects(site.name)]
            if sites:
                block.measure(sites, self.needs())
                rows += self.apply(block, sites)
                block.forget()
        return rows

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Quantize every site."""
        rows = []
        # sites that share an input stand together and share its matrix: it is ordered and factored once for all of them
        known: tuple[tuple[Gram, float, bool], _Visit] | None = None
        for site in sites:
            scheme = self.scheme_for(site.name, site.info.inputs)
            if scheme is None:
                continue
            here = self.for_site(site.name)
            block.context.progress.substep(f"gptq {site.info.name}")
            gram = site.statistic(Gram)
            key = (gram, here.damping, here.act_order)
            if known is None or known[0] != key:
                known = (key, here._visit(gram))
            # not before the factorisation, which is what takes the most memory
            weight_OI = site.weight_OI
            plain = fit(weight_OI, scheme.weights, scale_dtype=site.storage_dtype)
            plain_OI = round_to_codes(weight_OI, plain)
            codes_OI, fitted, degraded = here._quantize(weight_OI, scheme.weights, gram, known[1], site)
            error_before, error = relative_errors(weight_OI, [(plain_OI, plain), (codes_OI, fitted)], gram)
            if error > error_before:
                codes_OI, fitted, error = plain_OI, plain, error_before
                degraded = "GPTQ did worse than rounding to nearest: rounded to nearest"
            put_codes(site, scheme, codes_OI, fitted)
            rows.append(
                report_row(
                    site,
                    scheme,
                    "gptq",
                    error=error,
                    error_before=error_before,
                    tokens=gram.tokens,
                    degraded=degraded,
                )
            )
        return rows

    def _visit(self, gram: Gram) -> _Visit:
        diagonal_I = gram.sum_II.diagonal()
        order_I = diagonal_I.argsort(descending=True, stable=True) if self.act_order else None
        visit_I = torch.arange(len(diagonal_I), device=diagonal_I.device) if order_I is None else order_I
        return _Visit(order_I, visit_I, inverse_factor(gram.sum_II, self.damping, order_I))

    def _quantize(
        self, weight_OI: Tensor, grid: Grid, gram: Gram, visit: _Visit, site: LinearSite
    ) -> tuple[Tensor, Fitted, str | None]:
        """Codes, grid and, when a fallback was needed, why."""
        order_I, visit_I, factor = visit.order_I, visit.visit_I, visit.factor
        if factor is None:
            fitted = fit(weight_OI, grid, scale_dtype=site.storage_dtype)
            why = "no tokens reached it" if gram.tokens == 0 else "its Gram matrix is singular"
            return round_to_codes(weight_OI, fitted), fitted, f"{why}: rounded to nearest"
        rounding = RoundToGrid(
            weight_OI,
            grid,
            scale_dtype=site.storage_dtype,
            search=self.range,
            gram_II=gram.sum_II,
            order_I=order_I,
        )
        lazy = self.block if order_I is not None else block_length(grid.group, self.block)
        visited_IO = weight_OI.T[visit_I]
        # zeros are an earlier pass's mask: they stay zero, whatever the errors of other columns would make of them
        keeping = DropWeights(visited_IO == 0, rounding)
        sweep_columns_(visited_IO, factor.upper_II, keeping, block=lazy)
        raised = factor.damping > self.damping
        return (
            rounding.codes_IO.T.contiguous(),
            rounding.fitted,
            f"damping raised from {self.damping:g} to {factor.damping:g}" if raised else None,
        )
