"""The rank of every site under one budget, decided on the whole dense model. O = outputs, K = directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmcompress.calibration.whole import WholeModel
from llmcompress.model.site import LinearSite
from llmcompress.numerics.low_rank import Spectrum, break_even, output_spectrum, truncate
from llmcompress.numerics.rank_allocation import Matrix, allocate_ranks, equal_shares, uniform_rank
from llmcompress.numerics.statistics import Statistic

RankRule = Literal["uniform", "energy", "loss"]


class FactorOptions(Protocol):
    """What must be known of the pass that factors."""

    @property
    def rule(self) -> RankRule:
        """How ranks are found."""

    @property
    def round_to(self) -> int:
        """Ranks are multiples of this."""

    @property
    def keep(self) -> float:
        """Share of a site's parameters that goes into the budget."""

    def selects(self, site: str) -> bool:
        """Whether it works on that site."""

    def for_site(self, site: str) -> FactorOptions:
        """The options for that site."""

    def needs(self) -> tuple[type[Statistic], ...]:
        """Statistics that `metric` reads."""

    def metric(self, site: LinearSite) -> Tensor | None:
        """What the site's inputs are like."""


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


@dataclass(frozen=True)
class _Site:
    """A dense weight and its spectrum, on the CPU; the basis in single precision takes as much memory as the weight."""

    weight_OI: Tensor
    spectrum: Spectrum

    def of_rank(self, rank: int, device: torch.device) -> Tensor:
        """The best weight of that rank; the weight itself where factors would not be smaller."""
        if rank >= break_even(*self.weight_OI.shape):
            return self.weight_OI
        spectrum = Spectrum(self.spectrum.basis_OK.to(device).double(), self.spectrum.energy_K)
        return truncate(self.weight_OI.to(device), spectrum, rank).product()


def _by_energy(options: FactorOptions, whole: WholeModel) -> dict[str, int]:
    matrices = {}
    for site in _measured(options, whole):
        gain_K = equal_shares(output_spectrum(site.weight_OI, options.metric(site)).energy_K)
        step = options.for_site(site.name).round_to
        matrices[site.name] = Matrix(site.info.outputs, site.info.inputs, gain_K.cpu(), step)
    return _within_budget(options, matrices)


def _by_loss(options: FactorOptions, whole: WholeModel) -> dict[str, int]:
    """Gradients are measured with uniform ranks: at the dense model, whose gradients all but vanish, they say little
    of what hurts when everything has become worse.
    """
    found: dict[str, _Site] = {}
    for site in _measured(options, whole):
        spectrum = output_spectrum(site.weight_OI, options.metric(site))
        basis_OK = spectrum.basis_OK.float().cpu()
        found[site.name] = _Site(site.weight_OI.cpu(), Spectrum(basis_OK, spectrum.energy_K.cpu()))
    if not found:
        return {}
    uniform = {name: _uniform(options, name, *each.weight_OI.shape) for name, each in found.items()}
    with _truncated(whole, found, uniform):
        whole.context.progress.inside("gradients with uniform ranks")
        gradients = squared_gradients(whole, list(found))
        before = _perplexity(whole)
    matrices = {}
    for name, each in found.items():
        outputs, inputs = each.weight_OI.shape
        felt_K = each.spectrum.basis_OK.double().square().T @ gradients[name].double().cpu()
        step = options.for_site(name).round_to
        matrices[name] = Matrix(outputs, inputs, each.spectrum.energy_K * felt_K, step)
    ranks = _within_budget(options, matrices)
    with _truncated(whole, found, ranks):
        after = _perplexity(whole)
    stay = "" if after < before else ", which stay"
    whole.context.progress.note(
        f"ranks by loss: perplexity {after:.2f} on the calibration text, {before:.2f} with uniform ranks{stay}"
    )
    return ranks if after < before else uniform


def _within_budget(options: FactorOptions, matrices: Mapping[str, Matrix]) -> dict[str, int]:
    """Ranks of the least loss with no more parameters than uniform ones."""
    budget = sum(
        _uniform(options, name, each.outputs, each.inputs) * (each.outputs + each.inputs)
        for name, each in matrices.items()
    )
    return dict(zip(matrices, allocate_ranks(list(matrices.values()), budget), strict=True))


def _uniform(options: FactorOptions, site: str, outputs: int, inputs: int) -> int:
    here = options.for_site(site)
    return uniform_rank(outputs, inputs, here.keep, here.round_to)


@contextmanager
def _truncated(whole: WholeModel, found: Mapping[str, _Site], ranks: Mapping[str, int]) -> Iterator[None]:
    """Weights of these ranks; the dense ones again afterwards."""
    sites = [site for site in whole.sites() if site.name in found]
    try:
        for site in sites:
            site.write(found[site.name].of_rank(ranks[site.name], whole.context.device))
        yield
    finally:
        for site in sites:
            site.write(found[site.name].weight_OI)


def _perplexity(whole: WholeModel) -> float:
    with whole.resident():
        return whole.perplexity()


def _measured(options: FactorOptions, whole: WholeModel) -> Iterator[LinearSite]:
    """Every site whose rank is to be decided, measured."""
    for block in whole.stream():
        sites = [site for site in block.sites if _decides(options, site.name)]
        if sites and options.needs():
            block.measure(sites, options.needs())
        for site in sites:
            block.context.progress.inside(f"spectrum of {site.name}")
            yield site
        block.forget()


def _decides(options: FactorOptions, site: str) -> bool:
    """Whether the site's rank comes from the common budget: an override may fix it."""
    return options.selects(site) and options.for_site(site).rule == options.rule


def squared_gradients(whole: WholeModel, names: Sequence[str]) -> dict[str, Tensor]:
    """Per site and output channel: the sum over tokens of the squared gradient of the loss of their window.

    Zeros where none came.
    """
    sums: dict[str, Tensor] = {}
    with whole.resident() as model, ExitStack() as hooks:
        model.requires_grad_(False)
        hooks.enter_context(_needing_gradient(model.get_input_embeddings()))
        for site in whole.sites():
            if site.name in names:
                sums[site.name] = torch.zeros(site.info.outputs, device=whole.context.device)
                hooks.enter_context(_gradients_of(site.module, sums[site.name]))
        for ids_BT in whole.batches():
            with torch.enable_grad():
                (whole.loss(ids_BT) * len(ids_BT)).backward()  # type: ignore[no-untyped-call]
    return sums


@contextmanager
def _gradients_of(module: nn.Module, sum_O: Tensor) -> Iterator[None]:
    """Add the squares of the gradients of the module's output to `sum_O`."""

    def add(gradient: Tensor) -> None:
        sum_O.add_(gradient.detach().reshape(-1, gradient.shape[-1]).float().square().sum(0))

    def watch(_: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(add)  # type: ignore[no-untyped-call]

    with _hooked(module.register_forward_hook(watch)):
        yield


@contextmanager
def _needing_gradient(embedding: nn.Module) -> Iterator[None]:
    """Let gradients reach every block although no parameter wants one."""

    def ask(_: nn.Module, __: Any, output: Tensor) -> None:
        output.requires_grad_(True)

    with _hooked(embedding.register_forward_hook(ask)):
        yield


@contextmanager
def _hooked(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
