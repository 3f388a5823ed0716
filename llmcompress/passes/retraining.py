"""What `recover`, `distill` and `qat` share: one training on examples or the calibration text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from typing_extensions import override

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.site import LinearSite
from llmcompress.modules.low_rank import factors_of
from llmcompress.modules.trainable_roles import TrainableRoles
from llmcompress.passes.base import Backward, ModelPass, Trait
from llmcompress.passes.merging import mean_loss, requantized
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
from llmcompress.training.trainable_form import norm_weights, trainable_form

What = Literal["weights", "norms_and_scales", "factors_in_turn"]
"""What a retraining trains."""


@dataclass(frozen=True)
class Lesson:
    """What is learned, and from whom."""

    objective: Objective | None = None
    """None: cross-entropy."""
    teacher: Teacher | None = None
    sampler: Sampler | None = None


class TrainingPass(ModelPass):
    """One training on examples or the calibration text; subclasses say of what, and from whom the model learns."""

    learns_from_examples: ClassVar[bool] = True

    title: ClassVar[str]
    """For progress, and for report rows."""

    training: Training = Field(default_factory=Training, description="steps, learning rate and batches")

    @override
    def uses_data(self) -> bool:
        return True

    @abstractmethod
    def lesson(self, whole: WholeModel, data: IndexedSamples) -> Lesson:
        """With these options, for the model that is trained on `data`."""

    def run_training(self, whole: WholeModel, data: IndexedSamples, lesson: Lesson, job: Job) -> None:
        """The model must be resident."""
        train(
            whole.model, data, self.training, whole.context, objective=lesson.objective, teacher=lesson.teacher, job=job
        )


class Retraining(TrainingPass):
    """Train the model on examples or the calibration text: all weights, or LoRA adapters on every linear."""

    rank: int | None = Field(
        None,
        ge=1,
        description="rank of the LoRA adapters on every linear; null: train all weights (not after quantization)",
    )
    scale: float | None = Field(None, gt=0, description="scale of the adapters, α ÷ rank (2)")
    dora: bool = Field(False, description="weight-decomposed adapters (DoRA): the lengths of rows are trained apart")
    merge: Literal["apart", "requantize"] = Field(
        "apart",
        description="adapters on quantized linears. apart: they stay as a low-rank branch; requantize: they are added "
        "to the weight, which is rounded again, and what that costs is measured and told",
    )
    train: What = Field(
        "weights",
        description="weights: all, or adapters; norms_and_scales: norm weights, and the scales of quantized weights, "
        "whose codes stay; factors_in_turn: all left factors of low-rank linears, then all right ones, `steps` each",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, default in (("scale", None), ("dora", False), ("merge", "apart")):
            if getattr(self, name) != default and self.rank is None:
                raise ValueError(f"`{name}` applies to adapters: set `rank` too")
        if self.rank is not None and self.train == "norms_and_scales":
            raise ValueError("norms and scales have no adapters: remove `rank`, or `train`")
        return self

    @override
    def conflict_with(self, trait: Trait) -> str | None:
        """Codes may be there before adapters, which leave them alone, and before their scales are trained."""
        if trait == "codes" and self.dora:
            return "would scale the rows of quantized weights: use `rank` without `dora`"
        alone = self.rank is not None or self.train == "norms_and_scales"
        return None if trait == "codes" and alone else super().conflict_with(trait)

    @override
    def conflict_with_all(self, traits: frozenset[Trait]) -> str | None:
        """A branch of a quantized linear is dense."""
        fills = "codes" in traits and traits & {"zeros", "pattern"} and self.rank is not None
        return "would fill zeros through dense adapters" if fills else None

    @property
    def teacher_dtype(self) -> torch.dtype:
        """What teachers are loaded in."""
        return self.training.frozen_dtype

    @override
    def backward(self) -> Backward | None:
        """Another teacher than the model itself may be larger; its size is not known here."""
        optimized = 3 if self.rank is None and self.train == "weights" else 0  # adapters, norms, scales are small
        of_all = optimized + len(self.teachers()) * self.teacher_dtype.itemsize / torch.float32.itemsize
        training = self.training
        return Backward(of_all=of_all, windows=training.batch, trained_on=training.windows, lowered=training.lowered)

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
            degraded = _TRAINED_BY[self.train](self, whole, data, lesson)
        return [
            SiteReport(
                site=site.name,
                algorithm=self.title,
                sparsity=sparsity(site.weight_OI),
                rank=None if self.merge == "requantize" else ranks.get(site),
                degraded=degraded if site in ranks else None,
            )
            for site in sites
        ]

    def train_adapters(
        self, whole: WholeModel, data: IndexedSamples, lesson: Lesson, sites: Sequence[LinearSite], title: str
    ) -> str | None:
        """On these linears; why merging them did harm, if it did."""
        assert self.rank is not None
        scale = 2.0 if self.scale is None else self.scale
        merged = {site: site.module for site in sites if site.is_compressed} if self.merge == "requantize" else {}
        first = mean_loss(whole) if merged else 0.0
        with adapted(sites, rank=self.rank, scale=scale, seed=whole.context.seed, dora=self.dora) as adapters:
            job = Job(title, parameters=adapters, masks=ZerosStay([]), sampler=lesson.sampler)
            self.run_training(whole, data, lesson, job)
        return requantized(whole, merged, title=title, first=first) if merged else None


def training_samples(context: RunContext) -> IndexedSamples:
    """What the recipe's `data` steps made; without such steps, the calibration windows.

    Raises: CompressError where a row cannot be read.
    """
    return Windows(context.windows_NT) if context.examples is None else samples_of_rows(context.examples)


def _weights(each: Retraining, whole: WholeModel, data: IndexedSamples, lesson: Lesson) -> str | None:
    if each.rank is not None:
        return each.train_adapters(whole, data, lesson, whole.sites(), each.title)
    each.run_training(whole, data, lesson, Job(each.title, sampler=lesson.sampler))
    return None


def _norms_and_scales(each: Retraining, whole: WholeModel, data: IndexedSamples, lesson: Lesson) -> str | None:
    context = whole.context
    wanted = TrainableRoles(
        frozenset({"scales"}), keep_zeros=context.zeros_are_masks, storage_dtype=context.storage_dtype
    )
    with trainable_form(whole.model, wanted) as found:
        parameters = [*found.get("scales", []), *norm_weights(whole.model)]
        job = Job(each.title, parameters=parameters, masks=ZerosStay([]), sampler=lesson.sampler)
        each.run_training(whole, data, lesson, job)
    return None


def _factors_in_turn(each: Retraining, whole: WholeModel, data: IndexedSamples, lesson: Lesson) -> str | None:
    """Source: Wang et al., arXiv 2403.07378 (SVD-LLM), section 3.3: first one factor of all linears, then the other."""
    factors = [found for part in whole.model.modules() if (found := factors_of(part)) is not None]
    if not factors:
        raise CompressError(
            "recover.no-factors",
            "no linear is two factors that can be trained",
            where=f"{each.title}.train",
            fix="put a low-rank pass such as `svd` before it, or remove `train: factors_in_turn`",
            exit_code=ExitCode.USAGE,
        )
    for place, side in enumerate(("left", "right")):
        title = f"{each.title}, {side} factors"
        if each.rank is not None:
            sites = [site for site in whole.sites() if site.name.endswith(f".{side}")]
            each.train_adapters(whole, data, lesson, sites, title)
        else:
            job = Job(title, parameters=[pair[place] for pair in factors], sampler=lesson.sampler)
            each.run_training(whole, data, lesson, job)
    return None


_TRAINED_BY: Mapping[What, Callable[[Retraining, WholeModel, IndexedSamples, Lesson], str | None]] = {
    "weights": _weights,
    "norms_and_scales": _norms_and_scales,
    "factors_in_turn": _factors_in_turn,
}
