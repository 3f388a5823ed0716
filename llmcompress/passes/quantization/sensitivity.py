"""Sensitivity: how much the model loses with each candidate scheme at each site, by several measures. O = outputs, I =
inputs.

All are measured on the dense model. Measures on outputs use the actual quantizer; measures that need the whole model at
once (fisher, hessian, kl) round to nearest with searched ranges instead. Losses of one measure have the same unit for
all sites.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.site import LinearSite
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.grid import restore, round_to_codes, row_errors
from llmcompress.numerics.ranges import fit
from llmcompress.numerics.statistics import Gram
from llmcompress.passes.quantizing import QuantizingPass
from llmcompress.sensitivity.gradients import GradientObserver, OutputSquares, WeightGradients, oriented
from llmcompress.sensitivity.loss_estimators import Kinds, LossEstimator, measure_losses
from llmcompress.sensitivity.table import LossTable, Row

Sensitivity = Literal["gradients", "rate", "fisher", "hessian", "kl", "output"]

Candidates = Mapping[str, Sequence[Scheme | None]]
"""Full site name → its candidates; None: the site stays dense and loses nothing."""

Quantizers = Mapping[Scheme, QuantizingPass]
"""Scheme → the pass that quantizes with it, site by site; empty: rounding to nearest in the best ranges."""

DENSE = "dense"


def rounding_losses(kind: Sensitivity, whole: WholeModel, candidates: Candidates, quantizers: Quantizers) -> LossTable:
    """The loss of every candidate of every site, measured as `kind` says (see below), and its stored bits."""
    if kind in _ESTIMATORS:
        (table,) = measure_losses(whole, [_ESTIMATORS[kind](candidates, quantizers)])
        return table
    losses = {"hessian": hessian, "kl": divergence}[kind](whole, candidates)
    return LossTable(
        tuple(scheme_row(site, candidates[site.name], losses[site.name]) for site in _sites(whole, losses))
    )


def scheme_row(site: LinearSite, schemes: Sequence[Scheme | None], losses: Sequence[float]) -> Row:
    """The row of one site: bits of codes and scales, or of dense weights."""
    outputs, inputs = site.info.outputs, site.info.inputs
    stored = torch.finfo(site.storage_dtype).bits
    bits = [_bits(scheme, outputs, inputs, stored) for scheme in schemes]
    names = [DENSE if scheme is None else scheme.name for scheme in schemes]
    return Row.of(site.name, names, losses, bits, [(outputs, inputs)] * len(bits))


@dataclass
class _SchemeEstimator(LossEstimator):
    """Losses of all candidates of every site."""

    candidates: Candidates
    quantizers: Quantizers = field(default_factory=lambda: MappingProxyType({}))

    @property
    @override
    def sites(self) -> frozenset[str]:
        return frozenset(self.candidates)

    @override
    def rows(self, block: BlockWork, sites: Sequence[LinearSite]) -> Iterator[Row]:
        for site in sites:
            block.context.progress.substep(f"candidates of {site.name}")
            yield scheme_row(site, self.candidates[site.name], self.losses(block, site))

    @abstractmethod
    def losses(self, block: BlockWork, site: LinearSite) -> list[float]:
        """One per candidate."""


@dataclass
class RelativeOutput(_SchemeEstimator):
    """Squared error of each site's output ÷ its squared norm: all sites count equally."""

    @property
    @override
    def kinds(self) -> Kinds:
        return tuple(dict.fromkeys((Gram, *(kind for each in self.quantizers.values() for kind in each.needs()))))

    @override
    def losses(self, block: BlockWork, site: LinearSite) -> list[float]:
        signal = float(row_errors(site.weight_OI, site.statistic(Gram).sum_II).sum(dtype=torch.float64))
        return [float(error_O.sum()) / signal if signal > 0 else 0.0 for error_O in self.errors(block, site)]

    def errors(self, block: BlockWork, site: LinearSite) -> Iterator[Tensor]:
        """Per candidate the squared error of each output, float64."""
        gram_II, schemes = site.statistic(Gram).sum_II, self.candidates[site.name]
        changes = (
            _quantized(block, site, schemes, self.quantizers) if self.quantizers else _weight_errors(site, schemes)
        )
        for changed_OI in changes:
            yield row_errors(changed_OI, gram_II).double()


@dataclass
class WeightedOutput(RelativeOutput):
    """Squared output error weighted by the squared gradient of the loss: the expected increase of the loss to second
    order.

    Source: the objective of Young, arXiv 2409.02026 (CVXQ) and arXiv 2505.03031 (Radio). Differs: squared gradients are
    those of the loss on calibration text, not of projected logits; errors are measured, not modelled (`rate`).
    """

    def __post_init__(self) -> None:
        self.gradients = OutputSquares(list(self.candidates))

    @property
    @override
    def observers(self) -> Sequence[GradientObserver]:
        return (self.gradients,)

    @override
    def losses(self, block: BlockWork, site: LinearSite) -> list[float]:
        felt_O = self.gradients.sums[site.name].double()
        return [float(error_O @ felt_O) for error_O in self.errors(block, site)]


@dataclass
class ModelledRate(WeightedOutput):
    """The same with theoretical errors instead of measured ones: variance · 4^-bits for every weight.

    Minimizing their sum gives the rule B = ½ (log₂ variance + log₂ G² - log₂ λ), on discrete candidates.
    Source: as above, their rule for bit depths.
    """

    @property
    @override
    def kinds(self) -> Kinds:
        return (Gram,)

    @override
    def losses(self, block: BlockWork, site: LinearSite) -> list[float]:
        gram = site.statistic(Gram)
        felt_O = self.gradients.sums[site.name]
        sensitivity = float(felt_O.sum() * gram.sum_II.diagonal().sum()) / max(gram.tokens, 1)
        variance = float(site.weight_OI.var(correction=0))
        return [
            0.0 if scheme is None else sensitivity * variance * 4.0 ** -float(scheme.weights.own_bits)
            for scheme in self.candidates[site.name]
        ]


@dataclass
class Fisher(_SchemeEstimator):
    """Squared rounding errors weighted by the squared gradient of every weight, window by window."""

    def __post_init__(self) -> None:
        self.gradients = WeightGradients(list(self.candidates), sums=False, squares=True)

    @property
    @override
    def observers(self) -> Sequence[GradientObserver]:
        return (self.gradients,)

    @override
    def losses(self, block: BlockWork, site: LinearSite) -> list[float]:
        felt_OI = oriented(site, self.gradients.squares[site.name])
        errors = _weight_errors(site, self.candidates[site.name])
        return [float((error_OI.square() * felt_OI).sum(dtype=torch.float64)) for error_OI in errors]


_ESTIMATORS: Mapping[Sensitivity, type[_SchemeEstimator]] = MappingProxyType(
    {"gradients": WeightedOutput, "rate": ModelledRate, "fisher": Fisher, "output": RelativeOutput}
)


def hessian(whole: WholeModel, candidates: Candidates) -> dict[str, list[float]]:
    """Mean of the Hessian's diagonal at the site's weights times their squared rounding error.

    The trace is Hutchinson's estimate: one random sign vector over all sites per window; where it comes out negative
    it counts as nothing. Source: Xu et al., arXiv 2103.16472; Dong et al., arXiv 1911.03852 (HAWQ-V2).
    """
    generator = whole.context.generator()
    with whole.resident() as model:
        sites = _sites(whole, candidates)
        model.requires_grad_(False)
        weights = [site.module.get_parameter("weight").requires_grad_(True) for site in sites]
        traces = [0.0] * len(sites)
        for ids_BT in torch.split(whole.context.windows_NT, 1):
            # the fused attention kernels have no second derivative
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                loss = whole.loss(ids_BT.to(whole.context.device))
                signs = [_signs(weight, generator) for weight in weights]
                gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
                along = sum((g * v).sum() for g, v in zip(gradients, signs, strict=True))
                assert isinstance(along, Tensor)
                products = torch.autograd.grad(along, weights, materialize_grads=True)
            for index, (product, sign) in enumerate(zip(products, signs, strict=True)):
                traces[index] += float((product * sign).sum(dtype=torch.float64))
        return {
            site.name: [
                max(trace, 0.0) / weight.numel() * float(error_OI.square().sum(dtype=torch.float64))
                for error_OI in _weight_errors(site, candidates[site.name])
            ]
            for site, weight, trace in zip(sites, weights, traces, strict=True)
        }


@torch.no_grad()
def divergence(whole: WholeModel, candidates: Candidates) -> dict[str, list[float]]:
    """Kullback-Leibler divergence of the next token's distribution when that one site is rounded and no other.

    One forward per site and candidate. Source: Xu et al., arXiv 2103.16472.
    """
    losses = {name: [0.0] * len(each) for name, each in candidates.items()}
    with whole.resident() as model:
        sites = _sites(whole, candidates)
        for ids_BT in whole.batches():
            dense_TV = _log_probabilities(model, ids_BT)
            for site in sites:
                whole.context.progress.note(f"divergence of {site.name}")
                weight_OI = site.weight_OI
                for index, error_OI in enumerate(_weight_errors(site, candidates[site.name])):
                    if candidates[site.name][index] is not None:
                        site.write(weight_OI + error_OI)
                        rounded_TV = _log_probabilities(model, ids_BT)
                        spread = functional.kl_div(rounded_TV, dense_TV, log_target=True, reduction="none")
                        losses[site.name][index] += float(spread.sum(dtype=torch.float64))
                site.write(weight_OI)
    return losses


def _quantized(
    block: BlockWork, site: LinearSite, schemes: Sequence[Scheme | None], quantizers: Quantizers
) -> Iterator[Tensor]:
    """What the quantizers change in the site's weight; the dense module stands there again after each."""
    weight_OI, dense = site.weight_OI, site.module
    for scheme in schemes:
        if scheme is not None:
            quantizers[scheme].apply(block, [site])
        changed_OI = site.weight_OI - weight_OI
        site.replace(dense)
        yield changed_OI


def _weight_errors(site: LinearSite, schemes: Sequence[Scheme | None]) -> Iterator[Tensor]:
    """What rounding to each candidate adds to the weights, O×I."""
    weight_OI = site.weight_OI
    for scheme in schemes:
        if scheme is None:
            yield torch.zeros_like(weight_OI)
            continue
        fitted = fit(weight_OI, scheme.weights, scale_dtype=site.storage_dtype, search="mse")
        yield restore(round_to_codes(weight_OI, fitted), fitted) - weight_OI


def _sites(whole: WholeModel, names: Mapping[str, object]) -> list[LinearSite]:
    return [site for site in whole.sites() if site.name in names]


def _bits(scheme: Scheme | None, outputs: int, inputs: int, stored: int) -> int:
    if scheme is None:
        return stored * outputs * inputs
    return scheme.weights.code_bits(outputs * inputs) + scheme.weights.scale_bits(outputs, inputs, stored)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).to(like).mul_(2).sub_(1)


def _log_probabilities(model: nn.Module, ids_BT: Tensor) -> Tensor:
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return functional.log_softmax(logits_BTV.float().flatten(0, 1), -1)
