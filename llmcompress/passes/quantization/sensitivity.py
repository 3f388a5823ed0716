"""How much the model loses with each candidate scheme at each site, by several measures. O = outputs, I = inputs.

All are measured on the dense model. What is measured on outputs uses the very quantizer that will do the work; measures
that need the whole model at once (fisher, hessian, kl) round to nearest in the best ranges instead. Losses of one
measure have one unit over all sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.site import LinearSite
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.grid import restore, round_to_codes, row_errors
from llmcompress.numerics.ranges import fit
from llmcompress.numerics.statistics import Gram, Statistic
from llmcompress.passes.decomposition.ranks import squared_gradients
from llmcompress.passes.quantization.base import QuantizingPass

Sensitivity = Literal["gradients", "rate", "fisher", "hessian", "kl", "output"]

Candidates = Mapping[str, Sequence[Scheme | None]]
"""Full site name → its candidates; None: the site stays dense and loses nothing."""

Losses = dict[str, list[float]]
"""Full site name → one loss per candidate."""


Quantizers = Mapping[Scheme, QuantizingPass]
"""Scheme → the pass that quantizes with it, site by site; empty: rounding to nearest in the best ranges."""


def rounding_loss(kind: Sensitivity, whole: WholeModel, candidates: Candidates, quantizers: Quantizers) -> Losses:
    """The loss of every candidate of every site, measured as `kind` says (see the functions below)."""
    if kind in _BY_OUTPUT:
        return _BY_OUTPUT[kind](whole, candidates, quantizers)
    return _BY_WEIGHT[kind](whole, candidates)


def relative_output(whole: WholeModel, candidates: Candidates, quantizers: Quantizers) -> Losses:
    """Squared error of each site's output ÷ its squared output: all sites count the same."""
    losses: Losses = {}
    for site, gram_II, errors_CO in _output_errors(whole, candidates, quantizers):
        signal = float(row_errors(site.weight_OI, gram_II).sum(dtype=torch.float64))
        losses[site.name] = [float(each.sum()) / signal if signal > 0 else 0.0 for each in errors_CO]
    return losses


def weighted_output(whole: WholeModel, candidates: Candidates, quantizers: Quantizers) -> Losses:
    """Squared error of each output weighed by the squared gradient of the loss along it: its growth to second order.

    Source: the objective of Young, arXiv 2409.02026 (CVXQ) and arXiv 2505.03031 (Radio). Differs: squared gradients
    are those of the loss on calibration text, not of projected logits; errors are measured, not modelled (`rate`).
    """
    gradients = squared_gradients(whole, list(candidates))
    return {
        site.name: [float(each @ gradients[site.name].double()) for each in errors_CO]
        for site, _, errors_CO in _output_errors(whole, candidates, quantizers)
    }


def modelled_rate(whole: WholeModel, candidates: Candidates) -> Losses:
    """The same with errors of theory instead of measured ones: variance · 4^-bits for every weight.

    The least sum of these is what B = ½ (log₂ variance + log₂ G² - log₂ λ) asks for, on whole candidates.
    Source: as above, their rule for bit depths.
    """
    gradients = squared_gradients(whole, list(candidates))
    losses: Losses = {}
    for block in whole.stream():
        sites = [site for site in block.sites if site.name in candidates]
        if sites:
            block.measure(sites, (Gram,))
        for site in sites:
            gram, weight_OI = site.statistic(Gram), site.weight_OI
            sensitivity = float(gradients[site.name].sum() * gram.sum_II.diagonal().sum()) / max(gram.tokens, 1)
            variance = float(weight_OI.var(correction=0))
            losses[site.name] = [
                0.0 if scheme is None else sensitivity * variance * 4.0**-scheme.weights.bits
                for scheme in candidates[site.name]
            ]
        block.forget()
    return losses


def fisher(whole: WholeModel, candidates: Candidates) -> Losses:
    """Squared rounding errors weighed by the squared gradient of every weight, window by window."""
    with whole.resident() as model:
        sites = _resident_sites(whole, candidates)
        squares = {name: torch.zeros_like(weight) for name, weight in _wanting_gradients(model, sites)}
        for ids_BT in torch.split(whole.context.windows_NT, 1):
            with torch.enable_grad():
                whole.loss(ids_BT.to(whole.context.device)).backward()  # type: ignore[no-untyped-call]
            for site in sites:
                weight = _weight(site)
                if weight.grad is not None:
                    squares[site.name] += weight.grad.square()
                    weight.grad = None
        return {
            site.name: [
                float((error_OI.square() * _oriented(site, squares[site.name])).sum(dtype=torch.float64))
                for error_OI in _weight_errors(site, candidates)
            ]
            for site in sites
        }


def hessian(whole: WholeModel, candidates: Candidates) -> Losses:
    """Mean of the Hessian's diagonal at the site's weights times their squared rounding error.

    The trace is Hutchinson's estimate: one random sign vector over all sites per window; where it comes out negative
    it counts as nothing. Source: Xu et al., arXiv 2103.16472; Dong et al., arXiv 1911.03852 (HAWQ-V2).
    """
    generator = whole.context.generator()
    with whole.resident() as model:
        sites = _resident_sites(whole, candidates)
        weights = [weight for _, weight in _wanting_gradients(model, sites)]
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
                for error_OI in _weight_errors(site, candidates)
            ]
            for site, weight, trace in zip(sites, weights, traces, strict=True)
        }


@torch.no_grad()
def divergence(whole: WholeModel, candidates: Candidates) -> Losses:
    """Kullback-Leibler divergence of the next token's distribution when that one site is rounded and no other.

    One forward per site and candidate. Source: Xu et al., arXiv 2103.16472.
    """
    losses: Losses = {name: [0.0] * len(each) for name, each in candidates.items()}
    with whole.resident() as model:
        sites = _resident_sites(whole, candidates)
        for ids_BT in whole.batches():
            dense_TV = _log_probabilities(model, ids_BT)
            for site in sites:
                whole.context.progress.note(f"divergence of {site.name}")
                weight_OI = site.weight_OI
                for index, error_OI in enumerate(_weight_errors(site, candidates)):
                    if candidates[site.name][index] is not None:
                        site.write(weight_OI + error_OI)
                        rounded_TV = _log_probabilities(model, ids_BT)
                        spread = functional.kl_div(rounded_TV, dense_TV, log_target=True, reduction="none")
                        losses[site.name][index] += float(spread.sum(dtype=torch.float64))
                site.write(weight_OI)
    return losses


_BY_OUTPUT: Mapping[Sensitivity, Callable[[WholeModel, Candidates, Quantizers], Losses]] = {
    "gradients": weighted_output,
    "output": relative_output,
}
_BY_WEIGHT: Mapping[Sensitivity, Callable[[WholeModel, Candidates], Losses]] = {
    "rate": modelled_rate,
    "fisher": fisher,
    "hessian": hessian,
    "kl": divergence,
}


def _output_errors(
    whole: WholeModel, candidates: Candidates, quantizers: Quantizers
) -> Iterator[tuple[LinearSite, Tensor, list[Tensor]]]:
    """Every site, the Gram matrix of its input, and per candidate the squared error of each output."""
    read = (kind for each in quantizers.values() for kind in each.needs())
    kinds: tuple[type[Statistic], ...] = tuple(dict.fromkeys((Gram, *read)))
    for block in whole.stream():
        sites = [site for site in block.sites if site.name in candidates]
        if sites:
            block.measure(sites, kinds)
        for site in sites:
            block.context.progress.inside(f"candidates of {site.name}")
            gram_II = site.statistic(Gram).sum_II
            changes = (
                _quantized(block, site, candidates, quantizers) if quantizers else _weight_errors(site, candidates)
            )
            yield site, gram_II, [row_errors(changed_OI, gram_II).double() for changed_OI in changes]
        block.forget()


def _quantized(block: BlockWork, site: LinearSite, candidates: Candidates, quantizers: Quantizers) -> Iterator[Tensor]:
    """What the quantizers change in the site's weight; the dense module stands there again after each."""
    weight_OI, dense = site.weight_OI, site.module
    for scheme in candidates[site.name]:
        if scheme is not None:
            quantizers[scheme].apply(block, [site])
        changed_OI = site.weight_OI - weight_OI
        site.replace(dense)
        yield changed_OI


def _weight_errors(site: LinearSite, candidates: Candidates) -> Iterator[Tensor]:
    """What rounding to each candidate adds to the weights, O×I."""
    weight_OI = site.weight_OI
    for scheme in candidates[site.name]:
        if scheme is None:
            yield torch.zeros_like(weight_OI)
            continue
        fitted = fit(weight_OI, scheme.weights, scale_dtype=site.storage_dtype, search="mse")
        yield restore(round_to_codes(weight_OI, fitted), fitted) - weight_OI


def _resident_sites(whole: WholeModel, candidates: Candidates) -> list[LinearSite]:
    return [site for site in whole.sites() if site.name in candidates]


def _wanting_gradients(model: nn.Module, sites: Sequence[LinearSite]) -> list[tuple[str, nn.Parameter]]:
    """The weights of these sites, which from now on are the only parameters that want a gradient."""
    model.requires_grad_(False)
    weights = [(site.name, _weight(site)) for site in sites]
    for _, weight in weights:
        weight.requires_grad_(True)
    return weights


def _weight(site: LinearSite) -> nn.Parameter:
    return site.module.get_parameter("weight")


def _oriented(site: LinearSite, like_weight: Tensor) -> Tensor:
    """O×I, whatever the module's layout."""
    return like_weight.T if site.info.transposed else like_weight


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).to(like).mul_(2).sub_(1)


def _log_probabilities(model: nn.Module, ids_BT: Tensor) -> Tensor:
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return functional.log_softmax(logits_BTV.float().flatten(0, 1), -1)
