"""Rank allocation: the rank of every site under one budget, from the whole dense model. O = outputs, K = directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.site import LinearSite
from llmcompress.numerics.low_rank import output_spectrum
from llmcompress.numerics.rank_allocation import Matrix, equal_shares, uniform_rank
from llmcompress.numerics.statistics import Statistic
from llmcompress.passes.decomposition.spectra import DenseSite, SpectrumStore
from llmcompress.sensitivity.allocation import by_slopes
from llmcompress.sensitivity.gradients import squared_gradients
from llmcompress.sensitivity.loss_estimators import Kinds, LossEstimator, cached_table, dense_stream, measure_losses
from llmcompress.sensitivity.perplexity import perplexity
from llmcompress.sensitivity.table import LossTable, Row

RankRule = Literal["uniform", "energy", "loss"]


class FactorOptions(Protocol):
    """The options that rank allocation needs from a pass."""

    @property
    def rule(self) -> RankRule:
        """How ranks are found."""

    @property
    def round_to(self) -> int:
        """Ranks are multiples of this."""

    @property
    def keep(self) -> float:
        """Fraction of a site's parameters for the budget."""

    def selects(self, site: str) -> bool:
        """Whether it works on that site."""

    def for_site(self, site: str) -> FactorOptions:
        """The options for that site."""

    def needs(self) -> tuple[type[Statistic], ...]:
        """Statistics that `metric` reads."""

    def metric(self, site: LinearSite) -> Tensor | None:
        """The metric of the site's inputs."""


def decide_ranks(options: FactorOptions, whole: WholeModel) -> dict[str, Tensor]:
    """Site → rank, such that all together have no more parameters than with uniform ranks, and lose least.

    `energy` counts each site's lost share of its own squared output. `loss` weighs each lost direction of the output
    by the squared gradient of the loss along it: the expected growth of the loss to second order. Where many
    directions go and that says little, the loss itself decides: uniform ranks stay unless the others give less.

    Source: for the weights, Hsu et al., arXiv 2207.00112 (Fisher-weighted SVD). Differs: of outputs, not of weights;
    and gradients are those of the model with uniform ranks (docs/log.md).
    """
    found = (_by_loss if options.rule == "loss" else _by_energy)(options, whole)
    return {name: torch.tensor(rank) for name, rank in found.items()}


def rank_row(site: str, matrix: Matrix, bits_per_weight: int) -> Row:
    """Loss and size of every rank of a site; the last option is the dense matrix."""
    options = matrix.options()
    return Row.of(
        site,
        [*(str(option.rank) for option in options[:-1]), "dense"],
        [option.loss for option in options],
        [option.parameters * bits_per_weight for option in options],
        [(matrix.outputs, option.rank, matrix.inputs) for option in options],
    )


@dataclass
class _EnergyEstimator(LossEstimator):
    """Losses as a fraction of each site's squared output."""

    options: FactorOptions
    names: frozenset[str]

    @property
    @override
    def sites(self) -> frozenset[str]:
        return self.names

    @property
    @override
    def kinds(self) -> Kinds:
        return self.options.needs()

    @override
    def rows(self, block: BlockWork, sites: Sequence[LinearSite]) -> Iterator[Row]:
        for site in sites:
            block.context.progress.substep(f"spectrum of {site.name}")
            gain_K = equal_shares(output_spectrum(site.weight_OI, self.options.metric(site)).energy_K)
            step = self.options.for_site(site.name).round_to
            matrix = Matrix(site.info.outputs, site.info.inputs, gain_K.cpu(), step)
            yield rank_row(site.name, matrix, _bits(site))


def _by_energy(options: FactorOptions, whole: WholeModel) -> dict[str, int]:
    def measured() -> LossTable:
        (table,) = measure_losses(whole, [_EnergyEstimator(options, _names(options, whole))])
        return table

    return _within_budget(options, cached_table(whole, "rank-energies", measured))


def _by_loss(options: FactorOptions, whole: WholeModel) -> dict[str, int]:
    """Gradients are measured with uniform ranks: at the dense model, whose gradients all but vanish, they say little
    of what hurts when everything has become worse.
    """
    found, deciding = _spectra(options, whole), {site.name: site for site in _deciding(options, whole)}
    if not deciding:
        return {}
    uniform = {name: _uniform(options, name, site.info.outputs, site.info.inputs) for name, site in deciding.items()}
    with _truncated(whole, found, uniform) as rough:
        whole.context.progress.substep("gradients with uniform ranks")
        gradients = squared_gradients(rough, list(deciding))
        before = perplexity(rough)
    rows = []
    for name, each in found:
        outputs, inputs = each.weight_OI.shape
        felt_K = each.spectrum.basis_OK.double().square().T @ gradients[name].double().cpu()
        matrix = Matrix(outputs, inputs, each.spectrum.energy_K * felt_K, options.for_site(name).round_to)
        rows.append(rank_row(name, matrix, _bits(deciding[name])))
    ranks = _within_budget(options, LossTable(tuple(rows)))
    with _truncated(whole, found, ranks) as rough:
        after = perplexity(rough)
    stay = "" if after < before else ", which stay"
    whole.context.progress.note(
        f"ranks by loss: perplexity {after:.2f} on the calibration text, {before:.2f} with uniform ranks{stay}"
    )
    return ranks if after < before else uniform


def _spectra(options: FactorOptions, whole: WholeModel) -> SpectrumStore:
    names, found = _names(options, whole), SpectrumStore(whole)
    for block in dense_stream(whole, [(names, options.needs())]):
        sites = [site for site in block.sites if site.name in names]
        if not sites or found.has(block.info.index, [site.name for site in sites]):
            continue
        of_block = {}
        for site in sites:
            block.context.progress.substep(f"spectrum of {site.name}")
            of_block[site.name] = DenseSite.of(site, output_spectrum(site.weight_OI, options.metric(site)))
        found.add(block.info.index, of_block)
    return found


def _within_budget(options: FactorOptions, table: LossTable) -> dict[str, int]:
    """Ranks of the least loss that take no more than uniform ones."""
    budget = 0
    for row in table.rows:
        outputs, _, inputs = row.shape_CD[-1].tolist()
        bits_per_weight = int(row.bits_C[-1]) // (outputs * inputs)  # the last option is the matrix itself
        budget += _uniform(options, row.unit, outputs, inputs) * (outputs + inputs) * bits_per_weight
    chosen = by_slopes(table, budget)
    return {row.unit: int(row.shape_CD[chosen[row.unit], 1]) for row in table.rows}


def _uniform(options: FactorOptions, site: str, outputs: int, inputs: int) -> int:
    here = options.for_site(site)
    return uniform_rank(outputs, inputs, here.keep, here.round_to)


def _bits(site: LinearSite) -> int:
    return torch.finfo(site.storage_dtype).bits


@contextmanager
def _truncated(whole: WholeModel, found: SpectrumStore, ranks: Mapping[str, int]) -> Iterator[WholeModel]:
    """The model with weights of these ranks; the dense ones again afterwards."""
    sites = {site.name: site for site in whole.sites()}
    try:
        for name, each in found:
            sites[name].write(each.of_rank(ranks[name], whole.context.device))
        # what is measured now must not pass for what the dense model gives
        yield whole.within(whole.context.changing())
    finally:
        for name, each in found:
            sites[name].write(each.weight_OI)


def _deciding(options: FactorOptions, whole: WholeModel) -> list[LinearSite]:
    """Sites whose rank comes from the common budget: an override may fix it."""
    selected = [site for site in whole.sites() if options.selects(site.name)]
    return [site for site in selected if options.for_site(site.name).rule == options.rule]


def _names(options: FactorOptions, whole: WholeModel) -> frozenset[str]:
    return frozenset(site.name for site in _deciding(options, whole))
