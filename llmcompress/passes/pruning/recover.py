"""Recovery: a short training after pruning or factorization; zeros stay zero and shapes stay the same."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.passes.base import PASSES, Backward, ModelPass, Trait
from llmcompress.passes.pruning.sparse import sparsity
from llmcompress.records.rows import SiteReport
from llmcompress.training.adapters import adapted
from llmcompress.training.data.base import Windows
from llmcompress.training.job import Job
from llmcompress.training.loop import train
from llmcompress.training.masks import ZerosStay
from llmcompress.training.settings import Training


@PASSES.register("recover")
class Recover(ModelPass):
    """Train the compressed model on the calibration text: all weights, or LoRA adapters.

    Adapters are merged into dense weights without changing a zero. On quantized weights they stay as a low-rank branch,
    and the codes do not change.

    Source: Hu et al., arXiv 2106.09685 (adapters); Ma et al., arXiv 2305.11627, section 3.3 (after pruning); Dettmers
    et al., arXiv 2305.14314 (with quantized weights). Differs: adapters are masked, so merging keeps the sparsity.
    """

    rank: int | None = Field(
        None,
        ge=1,
        description="rank of the LoRA adapters on every linear; null: train all weights (not after quantization)",
    )
    scale: float | None = Field(None, gt=0, description="scale of the adapters, α ÷ rank (2)")
    training: Training = Field(default_factory=Training, description="steps, learning rate and batches")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.scale is not None and self.rank is None:
            raise ValueError("`scale` applies to adapters: set `rank` too")
        return self

    @override
    def conflict_with(self, trait: Trait) -> str | None:
        """Codes may be there before adapters, which leave them alone."""
        return None if trait == "codes" and self.rank is not None else super().conflict_with(trait)

    @override
    def conflict_with_all(self, traits: frozenset[Trait]) -> str | None:
        """A branch of a quantized linear is dense."""
        return (
            "would fill zeros through dense adapters" if "codes" in traits and traits & {"zeros", "pattern"} else None
        )

    @override
    def uses_data(self) -> bool:
        return True

    @override
    def backward(self) -> Backward | None:
        optimized = 3 if self.rank is None else 0  # adapters are small
        return Backward(of_all=optimized, windows=self.training.batch, trained_on=self.training.windows)

    @override
    def apply(self, whole: WholeModel) -> list[SiteReport]:
        sites = whole.sites()
        ranks = {
            site: min(self.rank, site.info.outputs, site.info.inputs)
            for site in sites
            if self.rank and site.is_compressed
        }
        if self.rank is not None and not sites:
            raise CompressError(
                "recover.no-sites",
                "no linear can take an adapter: all are quantized low-rank factors",
                fix="put `recover` right after the pass that quantizes",
            )
        with whole.resident() as model:
            if self.rank is None:
                train(model, Windows(whole.context.windows_NT), self.training, whole.context, job=Job("recover"))
            else:
                scale = 2.0 if self.scale is None else self.scale
                with adapted(sites, rank=self.rank, scale=scale, seed=whole.context.seed) as adapters:
                    job = Job("recover", parameters=adapters, masks=ZerosStay([]))
                    train(model, Windows(whole.context.windows_NT), self.training, whole.context, job=job)
        return [
            SiteReport(site=site.name, algorithm="recover", sparsity=sparsity(site.weight_OI), rank=ranks.get(site))
            for site in sites
        ]
