"""GPTQ: rounds column by column and compensates each error in the remaining columns. O = outputs, I = inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.site import LinearSite
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.gptq import Visit, swept_codes
from llmcompress.numerics.grid import Fitted, Grid, restore, round_to_codes, row_pieces
from llmcompress.numerics.ranges import RangeSearch, fit
from llmcompress.numerics.statistics import Gram, Statistic
from llmcompress.passes.base import PASSES
from llmcompress.passes.quantizing import (
    QuantizingPass,
    note_zeros,
    output_energy,
    output_noise,
    put_codes,
    report_row,
)
from llmcompress.records.rows import SiteReport


@PASSES.register("gptq")
class GPTQ(QuantizingPass):
    """Second-order rounding on the inputs that the compressed model itself produces.

    Source: Frantar et al., arXiv 2210.17323, Algorithm 1. Differs: scales of a group are fitted to weights corrected up
    to that column, and their ranges are clipped where that lowers the output error (docs/log.md); a site where the
    result is worse than rounding to nearest is rounded to nearest.
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
        "mse",
        description="mse: clip ranges to minimize the output error; joint: also search signs or zero points; "
        "minmax: cover all values",
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
        """Quantize every site; those that share an input are swept together."""
        rows: list[SiteReport] = []
        # sites that share an input stand together and share its matrix: it is ordered and factored once for all of them
        known: tuple[tuple[Gram, float, bool, int], Visit] | None = None
        note_zeros(block, sites)
        for here, scheme, members in self._together(sites):
            block.context.progress.substep(f"gptq {', '.join(site.info.name for site in members)}")
            gram = members[0].statistic(Gram)
            key = (gram, here.damping, here.act_order, here.block)
            if known is None or known[0] != key:
                visit = Visit.of(gram.sum_II, damping=here.damping, act_order=here.act_order, block=here.block)
                known = (key, visit)
            # not before the factorisation, which is what takes the most memory
            weights = [site.weight_OI for site in members]
            weight_OI = weights[0] if len(weights) == 1 else torch.cat(weights)
            pruned_OI = torch.cat([site.pruned_OI for site in members])
            found = here._codes(members[0], scheme.weights, known[1], weight_OI, pruned_OI)
            start = 0
            for site, own_OI in zip(members, weights, strict=True):
                piece = slice(start, start + len(own_OI))
                start = piece.stop
                rows.append(_put(site, scheme, own_OI, found.rows(piece)))
        return rows

    def _together(self, sites: Sequence[LinearSite]) -> Iterator[tuple[Self, Scheme, list[LinearSite]]]:
        """Neighbours with the same input, scheme and options, unless a scale looks at whole matrices."""
        previous: tuple[Self, Scheme, list[LinearSite]] | None = None
        for site in sites:
            scheme = self.scheme_for(site.name, site.info.inputs)
            if scheme is None:
                continue
            here = self.for_site(site.name)
            if previous:
                alike = previous[:2] == (here, scheme) and previous[2][0].statistic(Gram) is site.statistic(Gram)
                if alike and not scheme.weights.scales.depends_on_all_rows:
                    previous[2].append(site)
                    continue
                yield previous
            previous = (here, scheme, [site])
        if previous:
            yield previous

    def _codes(self, site: LinearSite, grid: Grid, visit: Visit, weight_OI: Tensor, pruned_OI: Tensor) -> _Found:
        """Of this site and its neighbours, whose weights follow."""
        gram, scale_dtype, factor = site.statistic(Gram), site.storage_dtype, visit.factor
        if factor is None:
            fitted = fit(weight_OI, grid, scale_dtype=scale_dtype)
            cause = "no tokens reached it" if gram.tokens == 0 else "its Gram matrix is singular"
            return _Found(round_to_codes(weight_OI, fitted), fitted, None, 0.0, f"{cause}: rounded to nearest")
        swept = swept_codes(
            weight_OI, grid, gram.sum_II, visit, scale_dtype=scale_dtype, search=self.range, pruned_OI=pruned_OI
        )
        raised = factor.damping > self.damping
        degraded = f"damping raised from {self.damping:g} to {factor.damping:g}" if raised else None
        return _Found(swept.codes_OI, swept.fitted, swept.loss_O, factor.ridge, degraded)


class _Found(NamedTuple):
    """Codes, their grid, what the sweep says of their error and, when a fallback was needed, why."""

    codes_OI: Tensor
    fitted: Fitted
    loss_O: Tensor | None
    ridge: float
    degraded: str | None

    def rows(self, piece: slice) -> _Found:
        """The same of some outputs, in memory of their own: codes and scales stay with a module."""
        fitted = self.fitted.rows(piece)
        shared = None if fitted.shared is None else fitted.shared.clone()
        own = replace(fitted, scale_OG=fitted.scale_OG.clone(), zero_OG=fitted.zero_OG.clone(), shared=shared)
        loss_O = None if self.loss_O is None else self.loss_O[piece]
        return self._replace(codes_OI=self.codes_OI[piece].clone(), fitted=own, loss_O=loss_O)

    def noise(self, weight_OI: Tensor, gram: Gram) -> float:
        """Squared output error: what the sweep has added up, without what damping put in.

        Where that is nearly all of it, the difference of the two says nothing, and the outputs are computed.
        """
        if self.loss_O is not None:
            loss, damping = float(self.loss_O.sum(dtype=torch.float64)), 0.0
            for rows in row_pieces(weight_OI):
                difference_OI = restore(self.codes_OI[rows], self.fitted.rows(rows)).sub_(weight_OI[rows])
                damping += self.ridge * float(difference_OI.square_().sum())
            if damping < _MOST_OF_IT * loss:
                return loss - damping
        return output_noise(weight_OI, self.codes_OI, self.fitted, gram)


_MOST_OF_IT = 0.9


def _put(site: LinearSite, scheme: Scheme, weight_OI: Tensor, found: _Found) -> SiteReport:
    """Codes at the site, or those of plain rounding where they err less."""
    gram, degraded = site.statistic(Gram), found.degraded
    plain = fit(weight_OI, scheme.weights, scale_dtype=site.storage_dtype)
    plain_OI = round_to_codes(weight_OI, plain)
    signal = output_energy(weight_OI, gram) or 1.0
    error_before, error = output_noise(weight_OI, plain_OI, plain, gram) / signal, found.noise(weight_OI, gram) / signal
    codes_OI, fitted = found.codes_OI, found.fitted
    if error > error_before:
        codes_OI, fitted, error = plain_OI, plain, error_before
        degraded = "GPTQ did worse than rounding to nearest: rounded to nearest"
    put_codes(site, scheme, codes_OI, fitted)
    return report_row(
        site, scheme, "gptq", error=error, error_before=error_before, tokens=gram.tokens, degraded=degraded
    )
