"""Outlier Suppression+: shifts channels to their center, then scales the largest down to a searched threshold.

C = channels of a shared input, P = channels of its producer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.model.map import Fold
from llmcompress.model.shift import has_biases, shift_fold
from llmcompress.model.site import LinearSite
from llmcompress.modules.scheme import DESCRIPTION, Scheme, named_scheme
from llmcompress.numerics.clusters import Range
from llmcompress.numerics.statistics import Statistic
from llmcompress.passes.base import PASSES, BlockPass, Trait
from llmcompress.passes.quantization.block_reconstruction import (
    Rearranged,
    Reconstruction,
    calls_of,
    observed,
    reconstruction_of,
)
from llmcompress.records.rows import SiteReport


@dataclass(frozen=True)
class _Candidate:
    """Shift and scale of the channels of a producer."""

    threshold: float
    shift_P: Tensor
    divide_P: Tensor


@PASSES.register("outlier_suppression")
class OutlierSuppression(BlockPass):
    """Move activation outliers into weights and biases, as far as it improves the output of the quantized sub-network.

    On every legal fold, each channel is shifted to the center of its range where the producer and all its readers have
    biases that can absorb the shift (in LayerNorm models), then divided by max(1, its largest magnitude / t). The
    threshold t is searched on the output of the module that encloses the readers (attention with its softmax, the FFN),
    computed with quantized weights and activations. No change, and t = max, are always among the candidates.

    Source: Wei et al., arXiv 2304.09145. Differs: thresholds are on a geometric grid from the largest to the median
    channel; where no separate module encloses the readers, the block's output decides, and for the readers of a linear
    (o_proj, down_proj) their own output.
    """

    conflicts: ClassVar[Mapping[Trait, str]] = {
        "ranges": "would shift and scale inputs that have static quantization ranges"
    }

    scheme: str = Field(
        "int8_channel_a8token",
        description=f"the scheme that a later pass quantizes to, activations included: {DESCRIPTION}",
    )
    points: int = Field(20, ge=1, le=200, description="thresholds tried per fold")
    shift: bool = Field(True, description="also shift channels where a bias can absorb the shift")
    batches: int = Field(2, ge=1, description="calibration batches for comparing candidates")

    @field_validator("scheme")
    @classmethod
    def _rounds_activations(cls, name: str) -> str:
        if named_scheme(name).activations is None:
            raise ValueError(
                f"{name!r} does not quantize activations: use a scheme that does, e.g. int8_channel_a8token"
            )
        return named_scheme(name).name

    @override
    def pools(self) -> bool:
        """No: it runs parts of the block on samples of its own."""
        return False

    @override
    def needs(self) -> tuple[type[Statistic], ...]:
        return (Range,)

    @override
    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        """Search and fold, one fold after the other; no fold changes the input of another one's readers."""
        rows = []
        for fold in block.folds_into(sites):
            block.context.progress.substep(f"outlier_suppression {fold.producer}")
            readers = [block.site(name) for name in fold.consumers]
            if readers[0].statistic(Range).tokens:
                rows += self.for_site(readers[0].name)._suppress(block, fold, readers)
        return rows

    def _suppress(self, block: BlockWork, fold: Fold, readers: Sequence[LinearSite]) -> list[SiteReport]:
        network = reconstruction_of(block, readers, enclosed=fold.producer_is_norm, batches=self.batches)
        schemes = [named_scheme(self.for_site(site.name).scheme) for site in readers]
        candidates = self._candidates(block, fold, readers[0].statistic(Range))
        errors = [_error(network, schemes, fold, each, readers[0].statistic(Range)) for each in candidates]
        best = min(range(len(errors)), key=errors.__getitem__)
        chosen = candidates[best]
        if bool(chosen.shift_P.any()):
            shift_fold(block.module, fold, chosen.shift_P, storage_dtype=block.context.storage_dtype)
        if bool((chosen.divide_P != 1).any()):
            block.fold(fold, chosen.divide_P)
        signal = network.signal
        return [
            SiteReport(
                site=site.name,
                algorithm="outlier_suppression",
                error=errors[best] / signal if signal else 0.0,
                error_before=errors[0] / signal if signal else 0.0,
                tokens=site.statistic(Range).tokens,
                score=chosen.threshold,
            )
            for site in readers
        ]

    def _candidates(self, block: BlockWork, fold: Fold, measured: Range) -> list[_Candidate]:
        """Nothing at all first; then, with the shift if it is legal, t from the largest channel down."""
        map_C = torch.tensor(fold.channel_map, device=measured.low_I.device)
        producers = block.producer_channels(fold)
        zero_P = torch.zeros(producers, device=map_C.device)
        one_P, fed_P = torch.ones_like(zero_P), torch.zeros_like(zero_P, dtype=torch.bool).index_fill(0, map_C, True)
        low_P = zero_P.scatter_reduce(0, map_C, measured.low_I, "amin", include_self=False)
        high_P = zero_P.scatter_reduce(0, map_C, measured.high_I, "amax", include_self=False)
        middle_P = (low_P + high_P) / 2
        found = [_Candidate(float(torch.maximum(high_P, -low_P)[fed_P].max()), zero_P, one_P)]
        shift_P = middle_P if self.shift and _shift_is_legal(block, fold, middle_P) else zero_P
        reach_P = torch.where(fed_P, torch.maximum(high_P - shift_P, shift_P - low_P), zero_P)
        most, middle = float(reach_P[fed_P].max()), float(reach_P[fed_P].median())
        for point in range(self.points if 0 < middle < most else 1):
            threshold = most * (middle / most) ** (point / max(1, self.points - 1))
            divide_P = (reach_P / threshold).clamp_min(1) if threshold > 0 else one_P
            found.append(_Candidate(threshold, shift_P, divide_P))
        return found


def _error(
    network: Reconstruction, schemes: Sequence[Scheme], fold: Fold, candidate: _Candidate, measured: Range
) -> float:
    map_C = torch.tensor(fold.channel_map, device=measured.low_I.device)
    shift_C, divide_C = candidate.shift_P[map_C], candidate.divide_P[map_C]
    reach_C = torch.maximum(measured.high_I - shift_C, shift_C - measured.low_I) / divide_C
    return network.error(schemes, Rearranged(shift_C, divide_C, reach_C.max()))


@torch.no_grad()
def _shift_is_legal(block: BlockWork, fold: Fold, shift_P: Tensor) -> bool:
    """Whether the block computes the same after the shift, and the readers see it: tried on one batch, and undone."""
    if not has_biases(block.module, fold):
        return False
    touched = [block.module.get_submodule(name) for name in (fold.producer, *fold.consumers)]
    saved = [module.get_parameter("bias").detach().clone() for module in touched]
    reader = block.site(fold.consumers[0])
    (call,) = calls_of(block, block.module, reader, batches=1)
    before = observed(block, reader, call)
    shift_fold(block.module, fold, shift_P, storage_dtype=torch.float32)
    after = observed(block, reader, call)
    for module, bias in zip(touched, saved, strict=True):
        module.get_parameter("bias").copy_(bias)
    map_C = torch.tensor(fold.channel_map, device=shift_P.device)
    pairs = (before[0] - shift_P[map_C], after[0]), (before[1], after[1])
    return all(bool((one - other).abs().max() <= 1e-3 * one.abs().max()) for one, other in pairs)
