"""What `recover` and `distill` share: one training of all weights or of adapters; zeros stay zero."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

from pydantic import Field, model_validator
from typing_extensions import override

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.passes.base import Backward, ModelPass, Trait
from llmcompress.passes.pruning.sparse import sparsity
from llmcompress.records.rows import SiteReport
from llmcompress.training.adapters import adapted
from llmcompress.training.data.base import IndexedSamples, Windows
from llmcompress.training.data.examples import samples_of_rows
from llmcompress.training.job import Job
from llmcompress.training.loop import train
from llmcompress.training.masks import ZerosStay
from llmcompress.training.objectives.base import Objective
from llmcompress.training.on_policy import Sampler
from llmcompress.training.settings import Training
from llmcompress.training.teacher import Teacher


@dataclass(frozen=True)
class Lesson:
    """What is learned, and from whom."""

    objective: Objective | None = None
    """None: cross-entropy."""
    teacher: Teacher | None = None
    sampler: Sampler | None = None


class Retraining(ModelPass):
    """Train the model on examples or the calibration text: all weights, or LoRA adapters on every linear."""

    learns_from_examples: ClassVar[bool] = True

    title: ClassVar[str]
    """For progress, and for report rows."""

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
        """Another teacher than the model itself may be larger; its size is not known here."""
        optimized = 3 if self.rank is None else 0  # adapters are small
        of_all = optimized + len(self.teachers())
        return Backward(of_all=of_all, windows=self.training.batch, trained_on=self.training.windows)

    @abstractmethod
    def lesson(self, whole: WholeModel, data: IndexedSamples) -> Lesson:
        """With these options, for the model that is trained on `data`."""

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
                fix=f"put `{self.title}` right after the pass that quantizes",
            )
        data = training_samples(whole.context)
        with whole.resident():
            lesson = self.lesson(whole, data)
            if self.rank is None:
                self._train(whole, data, lesson, Job(self.title, sampler=lesson.sampler))
            else:
                scale = 2.0 if self.scale is None else self.scale
                with adapted(sites, rank=self.rank, scale=scale, seed=whole.context.seed) as adapters:
                    job = Job(self.title, parameters=adapters, masks=ZerosStay([]), sampler=lesson.sampler)
                    self._train(whole, data, lesson, job)
        return [
            SiteReport(site=site.name, algorithm=self.title, sparsity=sparsity(site.weight_OI), rank=ranks.get(site))
            for site in sites
        ]

    def _train(self, whole: WholeModel, data: IndexedSamples, lesson: Lesson, job: Job) -> None:
        train(
            whole.model, data, self.training, whole.context, objective=lesson.objective, teacher=lesson.teacher, job=job
        )


def training_samples(context: RunContext) -> IndexedSamples:
    """What the recipe's `data` steps made; without such steps, the calibration windows.

    Raises: CompressError where a row cannot be read.
    """
    return Windows(context.windows_NT) if context.examples is None else samples_of_rows(context.examples)
