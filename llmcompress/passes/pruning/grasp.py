"""GraSP: prunes weights so that the gradient norm of the sparse model, and with it its trainability, is preserved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.model.site import LinearSite
from llmcompress.numerics.loss import next_token_loss
from llmcompress.numerics.saliency import kept_gradient_flow
from llmcompress.passes.base import PASSES, Backward
from llmcompress.passes.pruning.at_init import AtInitPass, as_stored, finite, gradients_of, trained_weight


@PASSES.register("grasp")
class GraSP(AtInitPass):
    """Zero the weights with the lowest w (H g), whose removal reduces the squared gradient norm least, or even
    increases it.

    Meant for models that are trained afterwards; the loss of an already trained model suffers.

    Source: Wang et al., arXiv 2002.07376. The logits are divided by a temperature of 200, as in the paper. H g comes
    from differentiating twice, which only the eager attention implementation allows.
    """

    temperature: float = Field(200.0, gt=0, description="temperature: the logits are divided by it before the loss")

    @override
    def uses_data(self) -> bool:
        return True

    @override
    def backward(self) -> Backward | None:
        return Backward(copies=6)

    @override
    def masks(self, whole: WholeModel, sites: Sequence[LinearSite]) -> list[Tensor]:
        weights = [trained_weight(site) for site in sites]
        # the fused attention kernels have no second derivative, the plain formula has
        with whole.resident() as model, gradients_of(weights, model), sdpa_kernel(SDPBackend.MATH):
            products = self._hessian_gradient(model, whole, weights)
            scores = [
                as_stored(site, kept_gradient_flow(weight, product))
                for site, weight, product in zip(sites, weights, products, strict=True)
            ]
        return self.drop(finite(scores, sites), [site.weight_OI == 0 for site in sites])

    def _hessian_gradient(self, model: PreTrainedModel, whole: WholeModel, weights: list[nn.Parameter]) -> list[Tensor]:
        """H g of the mean loss over all windows: first g, then the derivative of (g of each batch) · g."""
        gradient = [torch.zeros_like(weight) for weight in weights]
        share = 1 / len(whole.context.windows_NT)
        for ids_BT in whole.batches():
            whole.context.progress.substep("grasp gradient")
            found = torch.autograd.grad(self._loss(model, ids_BT), weights, allow_unused=True)
            for total, each in zip(gradient, found, strict=True):
                if each is not None:
                    total += share * len(ids_BT) * each
        products = [torch.zeros_like(weight) for weight in weights]
        for ids_BT in whole.batches():
            whole.context.progress.substep("grasp second derivative")
            found = torch.autograd.grad(self._loss(model, ids_BT), weights, create_graph=True, allow_unused=True)
            aligned = torch.stack(
                [(each * total).sum() for each, total in zip(found, gradient, strict=True) if each is not None]
            ).sum()
            second = torch.autograd.grad(aligned, weights, allow_unused=True)
            for product, each in zip(products, second, strict=True):
                if each is not None:
                    product += share * len(ids_BT) * each
        return products

    def _loss(self, model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
        return next_token_loss(model(input_ids=ids_BT, use_cache=False).logits / self.temperature, ids_BT)
