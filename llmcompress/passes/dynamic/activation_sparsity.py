"""Activation sparsity: small activations are skipped, channel by channel, for each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.map import ModelMap
from llmcompress.model.site import LinearSite
from llmcompress.model.units import feed_forward_readers
from llmcompress.modules.dynamic_activations import ThresholdedLinear
from llmcompress.numerics.sample import InputSample
from llmcompress.numerics.statistics import Statistic
from llmcompress.passes.base import PASSES, BlockPass, Trait
from llmcompress.records.rows import SiteReport


@PASSES.register("activation_sparsity")
class ActivationSparsity(BlockPass):
    """Every linear ignores inputs below its own threshold: the `sparsity` quantile of their magnitudes on the
    calibration text.

    Source: Liu et al. (TEAL), arXiv 2408.14690; Lee et al. (CATS), arXiv 2404.08763.
    Differs: the same sparsity for all selected sites (TEAL searches one per block); by default only the FFN's hidden
    activations, as in CATS. Weights and file size do not change; decoding one sequence reads fewer columns of the
    weights. Several tokens at once (a prompt, a batch) compute the same result without a speed-up.
    """

    leaves: ClassVar[frozenset[Trait]] = frozenset({"dynamic"})
    conflicts: ClassVar[Mapping[Trait, str]] = {"factors": "needs a single matrix, not low-rank factors"}
    changes_sites: ClassVar[bool] = True
    whole_block: ClassVar[frozenset[str]] = frozenset({"inputs"})

    sparsity: float = Field(0.5, ge=0, lt=1, description="fraction of the inputs set to zero, on the calibration text")
    inputs: Literal["ffn", "all"] = Field(
        "ffn",
        description="ffn: the FFN's hidden activations (input of down_proj); all: the input of every selected site",
    )

    @override
    def needs(self) -> tuple[type[Statistic], ...]:
        return (InputSample,)

    @override
    def check(self, model_map: ModelMap) -> None:
        """Raises: CompressError when `sites` leaves no feed-forward network."""
        inner = {block.full(name) for block in model_map.blocks for name in feed_forward_readers(block.structure)}
        if self.inputs == "ffn" and not any(self.selects(name) for name in inner):
            raise CompressError(
                "dynamic.no-sites",
                "none of the selected sites reads the hidden activations of an FFN",
                where=f"activation_sparsity.sites: {', '.join(self.sites)}",
                fix=f"select {', '.join(sorted(inner)[:1]) or 'other sites'}, or set `inputs: all`",
                exit_code=ExitCode.USAGE,
            )

    @override
    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Replace the sites; what they hold is not changed."""
        inner = feed_forward_readers(block.info.structure)
        rows = []
        for site in sites:
            if self.inputs == "ffn" and site.info.name not in inner:
                continue
            sample = site.statistic(InputSample)
            threshold = sample.magnitude_below(self.for_site(site.name).sparsity)
            columns_IO = site.weight_OI.T.contiguous()
            site.replace(ThresholdedLinear(columns_IO, site.bias_O, threshold))
            left = float((sample.rows_KI.abs() > threshold).float().mean()) if sample.tokens else 1.0
            rows.append(
                SiteReport(
                    site=site.name,
                    algorithm="activation_sparsity",
                    tokens=sample.tokens,
                    score=threshold,
                    active=left,
                    degraded=None if sample.tokens else "no calibration tokens: no activations are dropped",
                )
            )
        return rows
