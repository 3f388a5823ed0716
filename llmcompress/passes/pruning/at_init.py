"""What snip, grasp, synflow and random share: all masks are chosen first, then applied, with exactly the requested
sparsity.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.calibration.stream import BlockWork
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.model.site import LinearSite
from llmcompress.numerics.saliency import Comparison, drop_lowest
from llmcompress.numerics.statistics import Statistic
from llmcompress.passes.base import PASSES, BlockPass, Trait
from llmcompress.passes.pruning.packed_masks import pack_mask, unpack_mask
from llmcompress.passes.pruning.sparse import sparsity
from llmcompress.records.rows import SiteReport


class MaskPass(BlockPass):
    """Chooses all masks on the unchanged model, then applies them block by block."""

    leaves: ClassVar[frozenset[Trait]] = frozenset({"zeros"})
    decides: ClassVar[bool] = True
    whole_block: ClassVar[frozenset[str]] = frozenset({"sparsity"})

    sparsity: float = Field(
        0.5, ge=0, lt=1, description="sparsity over all selected sites: the fraction of weights that become zero"
    )

    @override
    def needs(self) -> tuple[type[Statistic], ...]:
        return ()

    @abstractmethod
    def masks(self, whole: WholeModel, sites: Sequence[LinearSite]) -> list[Tensor]:
        """True where a weight of the site is dropped, O×I on the CPU."""

    @override
    def streams(self) -> bool:
        return False

    @override
    def decide(self, whole: WholeModel) -> dict[str, Tensor]:
        sites = [site for site in whole.sites() if self.selects(site.name)]
        if not sites:
            return {}
        return {site.name: pack_mask(mask) for site, mask in zip(sites, self.masks(whole, sites), strict=True)}

    @override
    def apply(self, block: BlockWork, sites: Sequence[LinearSite]) -> list[SiteReport]:
        rows = []
        for site in sites:
            weight_OI = site.weight_OI
            mask_OI = unpack_mask(block.decisions[site.name], weight_OI.shape).to(weight_OI.device)
            weight_OI = weight_OI.masked_fill(mask_OI, 0)
            site.write(weight_OI)
            rows.append(SiteReport(site=site.name, algorithm=PASSES.name_of(type(self)), sparsity=sparsity(weight_OI)))
        return rows


class AtInitPass(MaskPass):
    """Zeros where a score is lowest; works on trained and on freshly initialised weights."""

    whole_block: ClassVar[frozenset[str]] = MaskPass.whole_block | {"comparison"}

    comparison: Comparison = Field(
        "global", description="rank weights across all selected sites, or within each site (layer)"
    )

    def drop(self, scores: Sequence[Tensor], zeros: Sequence[Tensor], share: float | None = None) -> list[Tensor]:
        """Masks that drop the lowest scores, weights that are zero already before all others."""
        return drop_lowest(scores, zeros, self.sparsity if share is None else share, self.comparison)


def trained_weight(site: LinearSite) -> nn.Parameter:
    """The live weight as the module stores it: inputs × outputs where `site.info.transposed`."""
    weight = site.module.get_parameter("weight")
    assert isinstance(weight, nn.Parameter)
    return weight


def as_stored(site: LinearSite, found: Tensor) -> Tensor:
    """Something of the live weight's shape as O×I on the CPU, and back."""
    return (found.T if site.info.transposed else found).detach().cpu()


def finite(scores: Sequence[Tensor], sites: Sequence[LinearSite]) -> Sequence[Tensor]:
    """The scores.

    Raises: CompressError naming the first site whose scores are not finite.
    """
    for site, score in zip(sites, scores, strict=True):
        if not bool(score.isfinite().all()):
            raise CompressError(
                "numerics.not-finite",
                "the gradients on the calibration data are NaN or Inf",
                where=site.name,
                fix="check the checkpoint with a plain forward pass; try another calibration text",
            )
    return scores


@contextmanager
def gradients_of(weights: Sequence[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """Only these weights get gradients."""
    before = [(each, each.requires_grad) for each in model.parameters()]
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for each, wanted in before:
            each.requires_grad_(wanted)
