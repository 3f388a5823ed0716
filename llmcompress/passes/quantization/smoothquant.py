"""SmoothQuant: moves activation outliers into the weights, where they quantize well. C = channels of a shared input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.site import LinearSite
from llmcompress.numerics.scaling import smoothing_factors
from llmcompress.numerics.statistics import AbsMax, Statistic
from llmcompress.passes.base import PASSES, BlockPass
from llmcompress.records.rows import SiteReport


@PASSES.register("smoothquant")
class SmoothQuant(BlockPass):
    """Divide the producer of a linear's input and multiply the linear; the block computes the same.

    Source: Xiao et al., arXiv 2211.10438. Differs: uses every legal fold of the model map, not only norm → linear: the
    inputs of o_proj and down_proj have outliers too (docs/log.md).
    """

    whole_block: ClassVar[frozenset[str]] = frozenset({"folds"})

    strength: float = Field(
        0.5, ge=0, le=1, description="alpha: how much of the quantization difficulty moves into the weights"
    )
    folds: Literal["norms", "all"] = Field(
        "all", description="norms: only norm → linear, as in the paper; all: v → o and up → down too"
    )

    def needs(self) -> tuple[type[Statistic], ...]:
        """The largest magnitude of every input channel."""
        return (AbsMax,)

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Smooth every fold all of whose consumers are selected and still dense."""
        rows = []
        for fold in block.folds_into(sites):
            consumers = [block.site(name) for name in fold.consumers]
            strength = self.for_site(consumers[0].name).strength
            if strength == 0 or (self.folds == "norms" and not fold.producer_is_norm):
                continue
            block.context.progress.substep(f"smoothquant {fold.producer}")
            weight_max_C = torch.stack([site.weight_OI.abs().amax(0) for site in consumers]).amax(0)
            input_max_C = consumers[0].statistic(AbsMax).max_I
            producers = block.producer_channels(fold)
            channel_map_C = torch.tensor(fold.channel_map, device=input_max_C.device)
            factors_P = smoothing_factors(input_max_C, weight_max_C, channel_map_C, producers, strength=strength)
            block.fold(fold, factors_P)
            tokens = consumers[0].statistic(AbsMax).tokens
            rows += [SiteReport(site=site.name, algorithm="smoothquant", tokens=tokens) for site in consumers]
        return rows
