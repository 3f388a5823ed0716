"""AWQ: scales salient channels up before rounding, by a search on the output error; then clips. C = input channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.map import Fold
from llmcompress.model.site import LinearSite
from llmcompress.modules.scheme import DESCRIPTION, Scheme
from llmcompress.numerics.grid import Fitted, Grid, output_error, restore, round_to_codes, row_errors
from llmcompress.numerics.ranges import fit, lesser
from llmcompress.numerics.scaling import search_factors
from llmcompress.numerics.statistics import AbsMean, Gram, Statistic
from llmcompress.passes.base import PASSES, Trait
from llmcompress.passes.quantizing import QuantizingPass, put_codes, report_row
from llmcompress.records.rows import SiteReport


@PASSES.register("awq")
class AWQ(QuantizingPass):
    """Activation-aware scaling on every legal fold, then clipped rounding.

    With `round: false` only the scales are folded in, and the weights stay dense for a later pass (`gptq`).

    Rounding to nearest on better scales: an error is never compensated in other columns, as gptq does it. Where inputs
    are correlated, as they are in language models, and bits are few, that is most of what can be gained: at 3 bits take
    `gptq`, or `round: false` and `gptq` behind it (docs/log.md). `awq` alone is for texts so few that gptq fits them
    too closely, and for runtimes that know its files.

    Source: Lin et al., arXiv 2306.00978. Differs: errors are exact, from Gram matrices without forward passes (see
    `numerics/scaling.py`); no scaling is always among the candidates.
    """

    sitewise: ClassVar[bool] = False
    conflicts: ClassVar[Mapping[Trait, str]] = {"ranges": "would scale inputs that have static quantization ranges"}

    scheme: str = Field("int4_g128_asym", description=DESCRIPTION)
    points: int = Field(
        20, ge=1, le=200, description="grid size of the scale search: exponents tried per fold, 0 included"
    )
    clip: bool = Field(True, description="clip each group's range to minimize the output error")
    round: bool = Field(True, description="false: only scale, and let a later pass round")

    def traits(self) -> frozenset[Trait]:
        """Codes, but only when it rounds."""
        return self.leaves if self.round else frozenset()

    def needs(self) -> tuple[type[Statistic], ...]:
        """Gram matrix for errors, mean magnitude for salience."""
        return (Gram, AbsMean, *self.activation_statistics())

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Scale fold by fold, then round site by site."""
        before = {site.name: self._plain(site) for site in sites}
        scaled: set[str] = set()
        divided: set[str] = set()  # whose own outputs are others now, as a fold's producer
        for fold in block.folds_into(sites):
            block.context.progress.substep(f"awq scales {fold.producer}")
            if self._scale(block, fold, {} if divided & {*fold.consumers} else before):
                scaled.update(block.site(name).name for name in fold.consumers)
                divided.add(fold.producer)
        rows = []
        for site in sites:
            scheme = self.scheme_for(site.name, site.info.inputs)
            if scheme is None:
                continue
            if self.for_site(site.name).round:
                rows.append(self._round(site, scheme, before[site.name], divided=site.info.name in divided))
            elif site.name in scaled:
                rows.append(SiteReport(site=site.name, algorithm="awq", tokens=site.statistic(Gram).tokens))
        return rows

    def _scale(self, block: BlockWork, fold: Fold, before: Mapping[str, _Plain]) -> bool:
        """Search and fold in one set of factors; the consumers' statistics follow. False if none is best.

        `before` is empty where the consumers are no longer what they were measured as.
        """
        consumers = [block.site(name) for name in fold.consumers]
        schemes = [self.scheme_for(site.name, site.info.inputs) for site in consumers]
        rounded = [(site, scheme) for site, scheme in zip(consumers, schemes, strict=True) if scheme]
        if not rounded:
            return False
        gram, mean = consumers[0].statistic(Gram), consumers[0].statistic(AbsMean)
        channel_map_C = torch.tensor(fold.channel_map, device=gram.sum_II.device)
        found = search_factors(
            [(site.weight_OI, _rounder(scheme.weights, site.storage_dtype)) for site, scheme in rounded],
            gram.sum_II,
            mean.mean_I,
            channel_map_C,
            block.producer_channels(fold),
            points=self.for_site(consumers[0].name).points,
            unscaled=sum(before[site.name].noise for site, _ in rounded) if before else None,
        )
        if found.exponent > 0:
            block.fold(fold, found.factors_P)
            factors_C = found.factors_P[channel_map_C]
            for statistic in {id(s): s for site in consumers for s in site.statistics()}.values():
                statistic.rescale(factors_C)
        return found.exponent > 0

    def _round(self, site: LinearSite, scheme: Scheme, before: _Plain, *, divided: bool) -> SiteReport:
        weight_OI, gram = site.weight_OI, site.statistic(Gram)
        fitted = fit(weight_OI, scheme.weights, scale_dtype=site.storage_dtype)
        noise_O = _noise(weight_OI, fitted, gram)
        if self.for_site(site.name).clip:
            clipped = fit(weight_OI, scheme.weights, scale_dtype=site.storage_dtype, search="mse", gram_II=gram.sum_II)
            # the search looks at one group at a time; errors of groups with correlated inputs can still add up
            clipped_noise_O = _noise(weight_OI, clipped, gram)
            fitted = lesser(clipped, fitted, clipped_noise_O[:, None], noise_O[:, None])
            alone = scheme.weights.scales.single
            noise_O = _noise(weight_OI, fitted, gram) if alone else torch.minimum(noise_O, clipped_noise_O)
        signal = float(output_error(weight_OI, gram.sum_II)) if divided else before.signal
        put_codes(site, scheme, round_to_codes(weight_OI, fitted), fitted)
        return report_row(
            site,
            scheme,
            "awq",
            error=_relative(float(noise_O.sum(dtype=torch.float64)), signal),
            error_before=_relative(before.noise, before.signal),
            tokens=gram.tokens,
        )

    def _plain(self, site: LinearSite) -> _Plain:
        """Of plain rounding, before anything is scaled."""
        scheme = self.scheme_for(site.name, site.info.inputs)
        if scheme is None:
            return _Plain(0.0, 0.0)
        weight_OI, gram = site.weight_OI, site.statistic(Gram)
        fitted = fit(weight_OI, scheme.weights, scale_dtype=site.storage_dtype)
        noise_O = _noise(weight_OI, fitted, gram)
        return _Plain(float(noise_O.sum(dtype=torch.float64)), float(output_error(weight_OI, gram.sum_II)))


@dataclass(frozen=True)
class _Plain:
    """Squared error and squared norm of a site's outputs without scaling."""

    noise: float
    signal: float


def _relative(noise: float, signal: float) -> float:
    """Error ÷ output; 0 where there is no output."""
    return noise / signal if signal > 0 else 0.0


def _noise(weight_OI: Tensor, fitted: Fitted, gram: Gram) -> Tensor:
    """Squared output error of every row."""
    return row_errors(restore(round_to_codes(weight_OI, fitted), fitted) - weight_OI, gram.sum_II)


def _rounder(grid: Grid, scale_dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def rounded(weight_OC: Tensor) -> Tensor:
        fitted = fit(weight_OC, grid, scale_dtype=scale_dtype)
        return restore(round_to_codes(weight_OC, fitted), fitted)

    return rounded
