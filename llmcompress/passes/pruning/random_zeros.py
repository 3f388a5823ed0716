"""Random sparsity: the baseline of every score, and the start of sparse training from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.model.site import LinearSite
from llmcompress.numerics.masks import count_of_zeros, lowest, zeros_first
from llmcompress.numerics.schedule import erk_shares
from llmcompress.passes.base import PASSES
from llmcompress.passes.pruning.at_init import MaskPass


@PASSES.register("random")
class RandomZeros(MaskPass):
    """Zero random weights: for comparison, or before `rigl` on a freshly initialised model.

    Source: Mocanu et al., arXiv 1707.04780, and Evci et al., arXiv 1911.11134, for the Erdős–Rényi densities.
    """

    whole_block: ClassVar[frozenset[str]] = MaskPass.whole_block | {"densities"}

    densities: Literal["uniform", "erk"] = Field(
        "uniform",
        description="uniform: the same sparsity in every site; erk: the larger a site, the sparser (Erdős–Rényi)",
    )

    @override
    def uses_data(self) -> bool:
        return False

    @override
    def masks(self, whole: WholeModel, sites: Sequence[LinearSite]) -> list[Tensor]:
        shares = [self.sparsity] * len(sites)
        if self.densities == "erk":
            shares = erk_shares([(site.info.outputs, site.info.inputs) for site in sites], self.sparsity)
        generator = whole.context.generator()
        masks = []
        for site, share in zip(sites, shares, strict=True):
            weight_OI = site.weight_OI.cpu()
            lot_OI = torch.rand(weight_OI.shape, generator=generator)
            masks.append(lowest(zeros_first(lot_OI, weight_OI), count_of_zeros(share, weight_OI.numel())))
        return masks
