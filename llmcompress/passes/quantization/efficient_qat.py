"""EfficientQAT's first phase (Block-AP): quantization-aware training of all parameters, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from pydantic import Field
from torch import nn
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.site import LinearSite
from llmcompress.modules.quant_linear import codes_of
from llmcompress.modules.trainable_codes import TwinOfCodes
from llmcompress.modules.trainable_roles import Role, TrainableRoles
from llmcompress.passes.base import PASSES
from llmcompress.passes.quantization.block_training import BlockTraining, Group, LeastError, Steps, norms_of, trained
from llmcompress.passes.quantization.learned_codes import FIRST_CODES, LearnedCodes, with_errors
from llmcompress.records.rows import SiteReport

_TRAINED: frozenset[Role] = frozenset({"weights", "scales", "zero_points", "biases"})


@PASSES.register("efficient_qat")
class EfficientQAT(LearnedCodes):
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

    whole_block: ClassVar[frozenset[str]] = FIRST_CODES | {"rate", "scale_rate"}

    steps: int = Field(256, ge=1, description="optimization steps per block")
    rate: float = Field(0.01, gt=0, le=1, description="learning rate of weights and zero points, in steps of the grid")
    scale_rate: float = Field(0.002, gt=0, le=1, description="learning rate of scales, as a share of their mean")

    @override
    def learned(
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
        return with_errors(rows, "efficient_qat", twins, least)

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
