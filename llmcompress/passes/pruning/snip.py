"""SNIP: prunes the connections to which the loss is least sensitive."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.model.site import LinearSite
from llmcompress.numerics.saliency import connection_sensitivity
from llmcompress.passes.base import PASSES, Backward
from llmcompress.passes.pruning.at_init import AtInitPass, as_stored, finite, gradients_of, trained_weight


@PASSES.register("snip")
class SNIP(AtInitPass):
    """Zero the weights with the lowest |w g|, where g is the gradient of the next-token loss over all calibration
    windows.

    On a trained model this is LLM-Pruner's first-order score of individual weights.

    Source: Lee et al., arXiv 1810.02340. Differs: all calibration windows instead of one batch.
    """

    @override
    def uses_data(self) -> bool:
        return True

    @override
    def backward(self) -> Backward | None:
        return Backward(copies=2)

    @override
    def masks(self, whole: WholeModel, sites: Sequence[LinearSite]) -> list[Tensor]:
        weights = [trained_weight(site) for site in sites]
        with whole.resident() as model, gradients_of(weights, model):
            for index, ids_BT in enumerate(whole.batches()):
                whole.context.progress.substep(f"snip batch {index + 1}")
                whole.loss(ids_BT).mul(len(ids_BT)).backward()  # type: ignore[no-untyped-call]
            scores = [
                as_stored(site, connection_sensitivity(weight, gradient_of(weight)))
                for site, weight in zip(sites, weights, strict=True)
            ]
        return self.drop(finite(scores, sites), [site.weight_OI == 0 for site in sites])


def gradient_of(weight: torch.nn.Parameter) -> Tensor:
    """Zeros for a weight that the loss does not depend on: an expert that no token reached."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
