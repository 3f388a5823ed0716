"""End-to-end quantization-aware training of a model that an earlier pass quantized. O = outputs, I = inputs."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self, get_args

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError, ExitCode
from llmcompress.model.site import LinearSite
from llmcompress.modules.base import TrainableTwin
from llmcompress.modules.quant_linear import QuantLinear, quantized_linears
from llmcompress.modules.trainable_roles import Role, TrainableRoles
from llmcompress.passes.base import PASSES, Backward, Trait
from llmcompress.passes.distillation.distill import Distill
from llmcompress.passes.distillation.named_objectives import combined, objectives_of
from llmcompress.passes.globs import matches
from llmcompress.passes.retraining import Lesson, TrainingPass, training_samples
from llmcompress.records.rows import SiteReport
from llmcompress.training.data.base import IndexedSamples
from llmcompress.training.job import Job
from llmcompress.training.masks import ZerosStay
from llmcompress.training.on_policy import OnPolicy
from llmcompress.training.teacher_store import Stored
from llmcompress.training.trainable_form import norm_weights, trainable_form

Trained = Literal["weights", "scales", "zero_points", "biases", "norms"]

_ORIGINAL = "original"
_SAME_WEIGHT = 0.5
"""Squared error ÷ squared weight up to which codes count as those of a dense weight: plain rounding to two bits has a
quarter of it, the codes of another matrix four times as much."""


@PASSES.register("qat")
class QuantizationAwareTraining(TrainingPass):
    """Train a quantized model end to end: weights are rounded in every forward, and the codes of the last one are what
    is stored.

    Starts from the codes of the passes before it (rtn, gptq, gsq, efficient_qat, …); schemes, rounded activations and a
    quantized KV cache are theirs. By default it learns from the dense model: plain KL to its distributions
    (quantization-aware distillation, QAD). `train: [weights]` is straight-through training on fixed grids;
    `[weights, scales]` learns the step sizes too (LSQ), `zero_points` LSQ+; `[scales]` leaves the codes alone (E2E-QP,
    the second phase of EfficientQAT). With `calibration.source: self` the text is the dense model's own (LLM-QAT).

    Source: Esser et al., arXiv 1902.08153 (LSQ); Bhalgat et al., arXiv 2004.09576 (LSQ+); Liu et al., arXiv 2305.17888
    (LLM-QAT); Chen et al., arXiv 2407.11062 (E2E-QP); arXiv 2601.20088 (QAD). Differs from LLM-QAT: step sizes are
    learned, not the minimum and maximum of the weights.
    """

    title: ClassVar[str] = "qat"

    train: tuple[Trained, ...] = Field(
        ("weights", "scales", "zero_points", "biases", "norms"),
        description="what is trained; without `weights` the codes stay",
    )
    start: Literal["dense", "codes"] = Field(
        "dense",
        description="dense: weights begin where the original model's lie between the codes; codes: at what the codes "
        "stand for, half a step from every other code",
    )
    teacher: str | tuple[str, ...] = Field(
        _ORIGINAL, description="as in `distill`; not loaded if no objective reads it"
    )
    objective: dict[str, dict[str, Any]] = Field(
        {"kl": {}}, description="objectives with their options, which are added up, as in `distill`"
    )
    stored: Stored | None = Field(
        None, description="store the teacher's distributions on disk and read them from there"
    )
    on_policy: OnPolicy | None = Field(None, description="text that is generated during training")
    sites: tuple[str, ...] = Field(("*",), description="globs of the names of quantized modules to train")
    exclude: tuple[str, ...] = Field((), description="globs of the names of quantized modules that stay as they are")

    @field_validator("sites", "exclude", "teacher", "train", mode="before")
    @classmethod
    def _several(cls, value: Any, info: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        return (value,) if isinstance(value, str) and info.field_name in ("sites", "exclude") else value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.train:
            raise ValueError(f"`train` names nothing: use some of {', '.join(get_args(Trained))}")
        if self._learns_from_teacher():
            self._teaching()
        else:
            objectives_of(self.objective)
            if self.stored or self.on_policy:
                raise ValueError("no objective reads the teacher: remove `stored` and `on_policy`")
        return self

    def _learns_from_teacher(self) -> bool:
        by_teacher = self.on_policy is not None and self.on_policy.by == "teacher"
        return by_teacher or any(each.needs_teacher() for each in objectives_of(self.objective))

    def _teaching(self) -> Distill:
        """`distill` with these options."""
        options = {name: getattr(self, name) for name in ("teacher", "objective", "stored", "on_policy", "training")}
        return Distill.model_validate(options)

    @override
    def conflict_with(self, trait: Trait) -> str | None:
        """Codes, rounded inputs and a quantized KV cache are what it trains with."""
        return None if trait in ("codes", "ranges", "cache", "tables") else super().conflict_with(trait)

    @override
    def teachers(self) -> tuple[str, ...]:
        """Those it learns from, and the one whose weights it begins with."""
        names = self._teaching().teachers() if self._learns_from_teacher() else ()
        return tuple(dict.fromkeys((*names, *((_ORIGINAL,) if self._begins_dense() else ()))))

    @override
    def backward(self) -> Backward | None:
        """Gradients and two moments of all that is trained; rounded weights beside those they are rounded from."""
        copies = 5 if "weights" in self.train else 1
        dtype = self._teaching().teacher_dtype if self._learns_from_teacher() else torch.float32
        teachers = len(self.teachers()) * dtype.itemsize / torch.float32.itemsize
        training = self.training
        return Backward(copies, teachers, training.batch, training.windows, lowered=training.lowered)

    @override
    def lesson(self, whole: WholeModel, data: IndexedSamples) -> Lesson:
        if self._learns_from_teacher():
            return self._teaching().lesson(whole, data)
        return Lesson(combined(objectives_of(self.objective)))

    @override
    def apply(self, whole: WholeModel) -> list[SiteReport]:
        if not any(self._selects(name) for name in quantized_linears(whole.model)):
            raise CompressError(
                "qat.no-codes",
                "no selected module is quantized: there is nothing to train",
                where=self.title,
                fix="put a quantizer before it, such as `rtn` or `gptq`; check `sites` and `exclude`",
                exit_code=ExitCode.USAGE,
            )
        roles: frozenset[Role] = frozenset(role for role in self.train if role != "norms")
        wanted = TrainableRoles(
            roles, keep_zeros=whole.context.zeros_are_masks, storage_dtype=whole.context.storage_dtype
        )
        data = training_samples(whole.context)
        with whole.resident() as model:
            lesson = self.lesson(whole, data)
            before = {name: each.codes_OI for name, each in quantized_linears(model).items()}
            with trainable_form(model, wanted, only=self._selects) as found:
                parameters = [each for group in found.values() for each in group]
                if "norms" in self.train:
                    parameters += norm_weights(model)
                if self._begins_dense():
                    _begin_at(whole.sites(), whole.context.teachers.model(_ORIGINAL))
                job = Job(self.title, parameters=parameters, masks=ZerosStay([]), sampler=lesson.sampler)
                self.run_training(whole, data, lesson, job)
            trained = {name: each for name, each in quantized_linears(model).items() if self._selects(name)}
            if "weights" in self.train:
                changed = sum(int((each.codes_OI != before[name]).sum()) for name, each in trained.items())
                share = changed / sum(each.codes_OI.numel() for each in trained.values())
                whole.context.progress.note(f"{self.title}: {share:.1%} of the codes changed")
            return [self._row(name, each) for name, each in trained.items()]

    def _begins_dense(self) -> bool:
        return self.start == "dense" and "weights" in self.train

    def _selects(self, name: str) -> bool:
        return any(matches(name, glob) for glob in self.sites) and not any(matches(name, glob) for glob in self.exclude)

    def _row(self, name: str, module: QuantLinear) -> SiteReport:
        bits = module.quantized.bits / module.quantized.weights
        return SiteReport(site=name, algorithm=self.title, scheme=module.scheme.name, bits_per_weight=bits)


@torch.no_grad()
def _begin_at(sites: list[LinearSite], original: nn.Module) -> None:
    """Weights begin where those of the original model lie, wherever the codes are still codes of them."""
    for site in sites:
        twin = site.module
        try:  # an attention with a quantized cache is a wrapper around the original one
            module = original.get_submodule(site.name.replace(".inner.", "."))
        except AttributeError:
            continue  # a factor, or in a block that is new
        weight = getattr(module, "weight", None)
        if not isinstance(twin, TrainableTwin) or not isinstance(weight, Tensor):
            continue
        now_OI = twin.dense_weight()
        dense_OI = (weight.T if site.info.transposed else weight).to(now_OI)
        if (
            dense_OI.shape == now_OI.shape
            and (dense_OI - now_OI).square().sum() < _SAME_WEIGHT * dense_OI.square().sum()
        ):
            twin.begin_at(dense_OI)
