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
from llmcompress.numerics.low_rank import Spectrum, break_even, output_spectrum, truncate
from llmcompress.numerics.rank_allocation import Matrix, equal_shares, uniform_rank
from llmcompress.numerics.statistics import Statistic
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
        (table,) = measure_losses(whole, [_EnergyEstimator(options, _deciding(options, whole))])
        return table

    return _within_budget(options, cached_table(whole, "rank-energies", measured))


@dataclass(frozen=True)
class _Site:
    """A dense weight and its spectrum, on the CPU; the float32 basis takes as much memory as the weight."""

    weight_OI: Tensor
    """In the dtype of the checkpoint where that loses nothing."""
    spectrum: Spectrum
    bits_per_weight: int

    def of_rank(self, rank: int, device: torch.device) -> Tensor:
        """The best weight of that rank; the weight itself where factors would not be smaller."""
        if rank >= break_even(*self.weight_OI.shape):
            return self.weight_OI.float()
        spectrum = Spectrum(self.spectrum.basis_OK.to(device).double(), self.spectrum.energy_K)
        return truncate(self.weight_OI.to(device).float(), spectrum, rank).product()


def _by_loss(options: FactorOptions, whole: WholeModel) -> dict[str, int]:
    """Gradients are measured with uniform ranks: at the dense model, whose gradients all but vanish, they say little
    of what hurts when everything has become worse.
    """
    found = _spectra(options, whole)
    if not found:
        return {}
    uniform = {name: _uniform(options, name, *each.weight_OI.shape) for name, each in found.items()}
    with _truncated(whole, found, uniform) as rough:
        whole.context.progress.substep("gradients with uniform ranks")
        gradients = squared_gradients(rough, list(found))
        before = perplexity(rough)
    rows = []
    for name, each in found.items():
        outputs, inputs = each.weight_OI.shape
        felt_K = each.spectrum.basis_OK.double().square().T @ gradients[name].double().cpu()
        matrix = Matrix(outputs, inputs, each.spectrum.energy_K * felt_K, options.for_site(name).round_to)
        rows.append(rank_row(name, matrix, each.bits_per_weight))
    ranks = _within_budget(options, LossTable(tuple(rows)))
    with _truncated(whole, found, ranks) as rough:
        after = perplexity(rough)
    stay = "" if after < before else ", which stay"
    whole.context.progress.note(
        f"ranks by loss: perplexity {after:.2f} on the calibration text, {before:.2f} with uniform ranks{stay}"
    )
    return ranks if after < before else uniform


def _spectra(options: FactorOptions, whole: WholeModel) -> dict[str, _Site]:
    names, found = _deciding(options, whole), dict[str, _Site]()
    for block in dense_stream(whole, [(names, options.needs())]):
        for site in block.sites:
            if site.name in names:
                block.context.progress.substep(f"spectrum of {site.name}")
                spectrum = output_spectrum(site.weight_OI, options.metric(site))
                on_cpu = Spectrum(spectrum.basis_OK.float().cpu(), spectrum.energy_K.cpu())
                found[site.name] = _Site(_as_stored(site).cpu(), on_cpu, _bits(site))
    return found


def _as_stored(site: LinearSite) -> Tensor:
    weight_OI = site.weight_OI
    stored_OI = weight_OI.to(site.storage_dtype)
    return stored_OI if torch.equal(stored_OI.float(), weight_OI) else weight_OI


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
def _truncated(whole: WholeModel, found: Mapping[str, _Site], ranks: Mapping[str, int]) -> Iterator[WholeModel]:
    """The model with weights of these ranks; the dense ones again afterwards."""
    sites = [site for site in whole.sites() if site.name in found]
    try:
        for site in sites:
            site.write(found[site.name].of_rank(ranks[site.name], whole.context.device))
        # what is measured now must not pass for what the dense model gives
        yield whole.within(whole.context.changing())
    finally:
        for site in sites:
            site.write(found[site.name].weight_OI)


def _deciding(options: FactorOptions, whole: WholeModel) -> frozenset[str]:
    """Sites whose rank comes from the common budget: an override may fix it."""
    names = (site.name for site in whole.sites() if options.selects(site.name))
    return frozenset(name for name in names if options.for_site(name).rule == options.rule)
