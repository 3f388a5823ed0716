"""The rank of every site under one budget, decided on the whole dense model. O = outputs, K = directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmcompress.calibration.whole import WholeModel
from llmcompress.model.site import LinearSite
from llmcompress.numerics.low_rank import output_spectrum, truncate
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
    by the squared gradient of the loss along it: the expected growth of the loss to second order.

    Source: for the weights, Hsu et al., arXiv 2207.00112 (Fisher-weighted SVD). Differs: of outputs, not of weights;
    and gradients are those of the model with uniform ranks (docs/log.md).
    """
    weights = _gradients_when_factored(options, whole) if options.rule == "loss" else {}
    matrices: dict[str, Matrix] = {}
    for site in _measured(options, whole):
        spectrum = output_spectrum(site.weight_OI, options.metric(site))
        if weights:
            gain_K = spectrum.energy_K * (spectrum.basis_OK.square().T @ weights[site.name].double())
        else:
            gain_K = equal_shares(spectrum.energy_K)
        step = options.for_site(site.name).round_to
        matrices[site.name] = Matrix(site.info.outputs, site.info.inputs, gain_K.cpu(), step)
    budget = sum(
        uniform_rank(each.outputs, each.inputs, options.for_site(name).keep, each.step) * (each.outputs + each.inputs)
        for name, each in matrices.items()
    )
    ranks = allocate_ranks(list(matrices.values()), budget)
    return {name: torch.tensor(rank) for name, rank in zip(matrices, ranks, strict=True)}


def _measured(options: FactorOptions, whole: WholeModel) -> Iterator[LinearSite]:
    """Every site whose rank is to be decided, measured; what the caller leaves there is what later blocks see."""
    for block in whole.stream():
        sites = [site for site in block.sites if _decides(options, site.name)]
        if sites and options.needs():
            block.measure(sites, options.needs())
        for site in sites:
            block.progress.inside(f"spectrum of {site.name}")
            yield site
        block.forget()


def _decides(options: FactorOptions, site: str) -> bool:
    """Whether the site's rank comes from the common budget: an override may fix it."""
    return options.selects(site) and options.for_site(site).rule == options.rule


def _gradients_when_factored(options: FactorOptions, whole: WholeModel) -> dict[str, Tensor]:
    """Squared gradients where the compressed model will be: at the dense model, whose gradients all but vanish, they
    say little of what hurts when everything has become worse. The model is dense again afterwards.
    """
    dense: dict[str, Tensor] = {}
    for site in _measured(options, whole):
        here, weight_OI = options.for_site(site.name), site.weight_OI
        dense[site.name] = weight_OI.cpu()
        rank = uniform_rank(site.info.outputs, site.info.inputs, here.keep, here.round_to)
        site.write(truncate(weight_OI, output_spectrum(weight_OI, options.metric(site)), rank).product())
    weights = squared_gradients(whole, list(dense))
    for site in whole.sites():
        if site.name in dense:
            site.write(dense[site.name])
    return weights


def squared_gradients(whole: WholeModel, names: Sequence[str]) -> dict[str, Tensor]:
    """Per site and output channel: the sum over tokens of the squared gradient of the loss; zeros where none came."""
    sums: dict[str, Tensor] = {}
    with whole.resident() as model, ExitStack() as hooks:
        model.requires_grad_(False)
        hooks.enter_context(_needing_gradient(model.get_input_embeddings()))
        for site in whole.sites():
            if site.name in names:
                sums[site.name] = torch.zeros(site.info.outputs, device=whole.device)
                hooks.enter_context(_gradients_of(site.module, sums[site.name]))
        for ids_BT in whole.batches():
            with torch.enable_grad():
                whole.loss(ids_BT).backward()  # type: ignore[no-untyped-call]
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
