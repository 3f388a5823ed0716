"""Error propagation (QEP): corrects weights for the errors of earlier blocks before they are quantized."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import nn

from llmcompress.calibration.experts import in_expert
from llmcompress.calibration.stream import BlockWork
from llmcompress.model.site import LinearSite
from llmcompress.numerics.error_compensation import Drift, compensated
from llmcompress.numerics.statistics import Statistic
from llmcompress.passes.base import PASSES, BlockPass
from llmcompress.passes.nested_quantizer import AroundQuantizer
from llmcompress.passes.quantizing import QuantizingPass
from llmcompress.records.rows import SiteReport


@PASSES.register("error_propagation")
class ErrorPropagation(AroundQuantizer):
    """Adjust each block's weights to reproduce the dense model's outputs from the compressed model's inputs, then
    quantize them with another pass.

    A quantizer only preserves the output of a linear for its own inputs; errors that earlier blocks made in these
    inputs are passed on. Here every linear first gets the least-squares weights for compressed inputs and dense
    outputs, measured when all linears before it are quantized. How far the weights go is what helps on tokens they
    were not fitted to, and never more than `strength`. This takes 2.5 times as long as `gptq` alone. The errors in the
    report are those of quantizing the adjusted weights. Experts are not adjusted: their tokens differ between the two
    models.

    Source: Arai and Ichikawa, arXiv 2504.09629 (QEP). Differs: every input is measured when its turn comes, loud tokens
    count less, and each linear's own share of the way is found on the other half of the tokens (docs/log.md).
    """

    whole_block: ClassVar[frozenset[str]] = frozenset({"quantizer", "strength", "damping"})

    strength: float = Field(
        1.0,
        gt=0,
        le=1,
        description="strength of the correction: largest fraction of the least-squares change that is applied",
    )
    damping: float = Field(
        0.1, gt=0, description="ridge towards the original weights, as a fraction of the mean input energy"
    )

    def needs(self) -> tuple[type[Statistic], ...]:
        """Nothing that could be measured beforehand: every input group waits for the ones before it."""
        return ()

    def measures(self) -> tuple[type[Statistic], ...]:
        """What the quantizer reads."""
        return self.inner.needs()

    def forwards(self) -> int:
        """Of a usual block: a fourth of it, half, half and all of it, twice for what was lost and once to measure."""
        return 7

    def uses_data(self) -> bool:
        """Always, for both streams."""
        return True

    def wants_dense(self) -> bool:
        """The errors for which the weights compensate."""
        return True

    def pools(self) -> bool:
        """As the quantizer."""
        return self.inner.pools()

    def plain(self) -> Sequence[BlockPass] | None:
        """That of the quantizer."""
        return self.inner.plain()

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Group by group: move the weights, then quantize; a quantizer that needs the whole block comes last."""
        inner, dense = self.inner, copy.deepcopy(block.module)
        wanted = {site.name for site in sites}
        moved: set[str] = set()
        rows: list[SiteReport] = []
        later: list[LinearSite] = []
        for group in block.input_groups():
            members = [site for site in group if site.name in wanted]
            if not members or in_expert(members[0].name):
                later += members
                continue
            block.context.progress.substep(f"error_propagation {members[0].info.name}")
            moved |= self._compensate(block, dense, members)
            if inner.sitewise:
                rows += _quantized(block, inner, members)
            else:
                later += members
        if later:
            rows += _quantized(block, inner, later)
        return [
            row.model_copy(update={"algorithm": f"error_propagation, {row.algorithm}"}) if row.site in moved else row
            for row in rows
        ]

    def _compensate(self, block: BlockWork, dense: nn.Module, members: Sequence[LinearSite]) -> set[str]:
        """Names of the sites whose weights may move: those that are not compressed already."""
        moving = [site for site in members if not site.is_compressed]
        if moving:
            drift = Drift(moving[0].info.inputs, moving[0].weight_OI.device)
            block.side_by_side(moving[0], dense, drift.add)
            for half in drift.halves:
                block.pool_(half.gram_II)
                block.pool_(half.lost_II)
            weights = [site.weight_OI for site in moving]
            for site, weight_OI in zip(
                moving, compensated(weights, drift, strength=self.strength, damping=self.damping), strict=True
            ):
                site.write(weight_OI)
        return {site.name for site in moving}


def _quantized(block: BlockWork, quantizer: QuantizingPass, sites: Sequence[LinearSite]) -> list[SiteReport]:
    if quantizer.needs():
        block.measure(sites, quantizer.needs())
    rows = quantizer.apply(block, sites)
    block.forget()
    return rows
