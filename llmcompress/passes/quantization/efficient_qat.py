"""EfficientQAT's first phase (Block-AP): quantization-aware training of all parameters, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from pydantic import Field, field_validator
from torch import nn

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.site import LinearSite
from llmcompress.modules.quant_linear import codes_of
from llmcompress.modules.scheme import DESCRIPTION, named_scheme
from llmcompress.modules.trainable_codes import TwinOfCodes
from llmcompress.modules.trainable_roles import Role, TrainableRoles
from llmcompress.numerics.statistics import Statistic
from llmcompress.passes.base import PASSES
from llmcompress.passes.nested_quantizer import checked, nested
from llmcompress.passes.quantization.block_training import BlockTraining, Group, LeastError, Steps, norms_of, trained
from llmcompress.passes.quantizing import QuantizingPass
from llmcompress.records.rows import SiteReport

_TRAINED: frozenset[Role] = frozenset({"weights", "scales", "zero_points", "biases"})


@PASSES.register("efficient_qat")
class EfficientQAT(QuantizingPass):
    """Quantization-aware training block by block: weights, scales, zero points, biases and norm weights, to minimize
    the block's output error.

    The block's inputs come from the compressed blocks before it; its targets are the dense model's outputs. Weights are
    rounded in every forward, with straight-through gradients, and may take any code; memory is bounded by one block.
    The step with the least error on held-out windows is kept, the start included. `gsq` moves codes to their neighbours
    only; at equal steps both are level (docs/log.md). The second phase (E2E-QP: step sizes alone, end to end) is
    `qat: {train: [scales]}`.

    Source: Chen et al., arXiv 2407.11062 (EfficientQAT), section 3.2 (Block-AP). Differs: GPTQ or any other quantizer
    may find the first codes, not plain rounding alone; rates are relative to the steps of the grid, so that they fit
    models of any size of weights; errors of a token are relative to its norm; norms that feed other linears too are not
    trained.
    """

    sitewise: ClassVar[bool] = False
    whole_block: ClassVar[frozenset[str]] = frozenset({"quantizer", "steps", "windows", "rate", "scale_rate"})

    quantizer: dict[str, dict[str, Any]] = Field(
        {"gptq": {}}, description="one quantizing pass with its options but its scheme, which finds the first codes"
    )
    steps: int = Field(256, ge=1, description="optimization steps per block")
    windows: int = Field(1, ge=1, description="windows per step")
    rate: float = Field(0.01, gt=0, le=1, description="learning rate of weights and zero points, in steps of the grid")
    scale_rate: float = Field(0.002, gt=0, le=1, description="learning rate of scales, as a share of their mean")

    @field_validator("scheme")
    @classmethod
    def _integers(cls, name: str) -> str:
        scheme = named_scheme(name)
        if scheme.weights.number is not None:
            raise ValueError(f"rates are steps of an integer grid, and {name} has none: {DESCRIPTION}")
        return scheme.name

    @field_validator("quantizer")
    @classmethod
    def _known_quantizer(cls, named: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return checked(named)

    @property
    def inner(self) -> QuantizingPass:
        """The quantizer that finds the first codes."""
        return nested(self, self.quantizer)

    def needs(self) -> tuple[type[Statistic], ...]:
        """What the quantizer reads."""
        return self.inner.needs()

    def uses_data(self) -> bool:
        """Both streams do, whatever the quantizer reads."""
        return True

    def wants_dense(self) -> bool:
        """What the block is to give."""
        return True

    def pools(self) -> bool:
        """As the quantizer: gradients add up."""
        return self.inner.pools()

    def trained_windows(self) -> int:
        """Of all steps."""
        return self.steps * self.windows

    def run(self, block: BlockWork) -> list[SiteReport]:
        """Quantize as the quantizer does, then train."""
        sites = [site for site in block.sites if self.selects(site.name)]
        return self._trained(block, sites, lambda: self.inner.run(block))

    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """The same on sites that are measured already."""
        return self._trained(block, sites, lambda: self.inner.apply(block, sites))

    def _trained(
        self, block: BlockWork, sites: Sequence[LinearSite], quantize: Callable[[], list[SiteReport]]
    ) -> list[SiteReport]:
        norms = norms_of(block, sites)
        dense = {site: (site.weight_OI, bool(site.pruned_OI.any())) for site in sites}
        rows = quantize()
        twins: dict[LinearSite, TwinOfCodes] = {}
        for site, (weight_OI, pruned) in dense.items():
            if site.is_compressed:
                wanted = TrainableRoles(_TRAINED, keep_zeros=pruned, storage_dtype=site.storage_dtype)
                twins[site] = codes_of(site.module).trainable(wanted)
                twins[site].begin_at(weight_OI)
        if not twins:
            return rows
        for site, twin in twins.items():
            site.replace(twin)
        least = self._train(block, list(twins.values()), norms)
        for site, twin in twins.items():
            site.replace(twin.compressed())
        told, learned = {"error": least.error, "error_before": least.first}, {site.name for site in twins}
        return [
            row.model_copy(update={"algorithm": f"efficient_qat, {row.algorithm}", **told})
            if row.site in learned
            else row
            for row in rows
        ]

    def _train(self, block: BlockWork, twins: Sequence[TwinOfCodes], norms: Sequence[nn.Parameter]) -> LeastError:
        training = BlockTraining(block, windows=self.windows)
        groups = [Group([norm], self.rate * float(norm.detach().abs().mean())) for norm in norms]
        for twin in twins:
            step = twin.steps_of_codes()
            rates: dict[Role, float] = {
                "weights": self.rate * step,
                "scales": self.scale_rate * step,
                "zero_points": self.rate,
                "biases": self.rate * step,
            }
            groups += [Group([parameter], rates[role]) for role, parameter in twin.trained()]
        stored = [*norms, *(parameter for twin in twins for role, parameter in twin.trained() if role == "biases")]
        return trained(
            training, groups, Steps("efficient_qat", self.steps), error=lambda: training.stored_error(stored)
        )
