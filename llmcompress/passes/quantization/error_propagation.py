"""Error propagation (QEP): corrects weights for the errors of earlier blocks before they are quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field, field_validator

from llmcompress.calibration.experts import in_expert
from llmcompress.calibration.stream import BlockWork
from llmcompress.model.site import LinearSite
from llmcompress.numerics.error_compensation import Drift, compensated
from llmcompress.numerics.statistics import Statistic
from llmcompress.passes.base import PASSES
from llmcompress.passes.nested_quantizer import quantizer_with
from llmcompress.passes.quantizing import QuantizingPass
from llmcompress.records.rows import SiteReport


@PASSES.register("error_propagation")
class ErrorPropagation(QuantizingPass):
    """Adjust each block's weights to reproduce the dense model's outputs from the compressed model's inputs, then
    quantize them with another pass.

    A quantizer only preserves the output of a linear for its own inputs; errors that earlier blocks made in these
    inputs are passed on. Here every linear first gets the least-squares weights for compressed inputs and dense
    outputs, which takes three more forward passes. The errors in the report are those of quantizing the adjusted
    weights. Experts are not adjusted: their tokens differ between the two models.

    Source: Arai and Ichikawa, arXiv 2504.09629 (QEP). Differs: strength 1 and damping 0.1 (docs/log.md).
    """

    sitewise: ClassVar[bool] = False
    whole_block: ClassVar[frozenset[str]] = frozenset({"quantizer", "strength", "damping"})

    quantizer: dict[str, dict[str, Any]] = Field(
        {"gptq": {}},
        description="one quantization pass with its options, without its scheme, e.g. {gptq: {damping: 0.02}}",
    )
    strength: float = Field(
        1.0,
        gt=0,
        le=1,
        description="strength of the correction: fraction of the accumulated error that the weights compensate",
    )
    damping: float = Field(
        0.1, gt=0, description="ridge towards the original weights, as a fraction of the mean input energy"
    )

    @field_validator("quantizer")
    @classmethod
    def _known_quantizer(cls, named: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for options in named.values():
            if "on_indivisible" in options:
                raise ValueError("'on_indivisible' cannot be set inside `quantizer`: set it next to it")
        quantizer_with(named, "int4_channel")
        return named

    @property
    def inner(self) -> QuantizingPass:
        """The quantization pass, with this pass's other options."""
        ((name, options),) = self.quantizer.items()
        return quantizer_with(
            {name: {**options, "on_indivisible": self.on_indivisible}},
            self.scheme,
            sites=self.sites,
            exclude=self.exclude,
            overrides=self.overrides,
        )

    def needs(self) -> tuple[type[Statistic], ...]:
        """What the quantizer reads."""
        return self.inner.needs()

    def uses_data(self) -> bool:
        """Always, for both streams."""
        return True

    def wants_dense(self) -> bool:
        """The errors for which the weights compensate."""
        return True

    def pools(self) -> bool:
        """As the quantizer."""
        return self.inner.pools()

    def run(self, block: BlockWork) -> list[SiteReport]:
        """Move the weights, then do what the quantizer does."""
        return self._told(self._carry_on(block, block.sites), self.inner.run(block))

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """The same on sites that are measured already."""
        return self._told(self._carry_on(block, sites), self.inner.apply(block, sites))

    def _carry_on(self, block: BlockWork, sites: Sequence[LinearSite]) -> set[str]:
        """Names of the sites whose weights moved."""
        wanted = {site.name for site in sites if self.selects(site.name) and not site.is_compressed}
        groups = [
            members
            for group in block.input_groups()
            if (members := [site for site in group if site.name in wanted and not in_expert(site.name)])
        ]
        drifts = [Drift(members[0].info.inputs, members[0].weight_OI.device) for members in groups]
        block.side_by_side([members[0] for members in groups], [drift.add for drift in drifts])
        for members, drift in zip(groups, drifts, strict=True):
            block.pool_(drift.gram_II)
            block.pool_(drift.lost_II)
            weights = [site.weight_OI for site in members]
            for site, weight_OI in zip(
                members, compensated(weights, drift, strength=self.strength, damping=self.damping), strict=True
            ):
                site.write(weight_OI)
        return {site.name for members in groups for site in members}

    def _told(self, moved: set[str], rows: list[SiteReport]) -> list[SiteReport]:
        return [
            row.model_copy(update={"algorithm": f"error_propagation, {row.algorithm}"}) if row.site in moved else row
            for row in rows
        ]
