"""Distillation: the model as it is at this point of the recipe is the student of one teacher or several."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.calibration.whole import WholeModel
from llmcompress.passes.base import PASSES
from llmcompress.passes.distillation.named_objectives import combined, objectives_of, temperature_of
from llmcompress.passes.retraining import Lesson, Retraining
from llmcompress.passes.teaching import ensemble, named_teacher, store_of, teacher_of_other_vocabulary, tell_calibration
from llmcompress.training.data.base import IndexedSamples
from llmcompress.training.ensemble import EnsembleTeacher, Gate
from llmcompress.training.objectives.base import Objective
from llmcompress.training.objectives.divergence import Divergence
from llmcompress.training.objectives.exits import Exits
from llmcompress.training.objectives.features import FeatureObjective
from llmcompress.training.objectives.minillm import MiniLLM
from llmcompress.training.objectives.mutual import Mutual
from llmcompress.training.objectives.universal_logit import UniversalLogit
from llmcompress.training.on_policy import AdaptiveSampler, FractionSampler, OnPolicy, Sampler, Writer
from llmcompress.training.stored_teacher import stored
from llmcompress.training.teacher import Teacher
from llmcompress.training.teacher_store import Stored


@PASSES.register("distill")
class Distill(Retraining):
    """Train the model to predict what a teacher predicts, on given text or on text that it writes itself.

    The teacher is the dense model before compression, or any model with the same tokenizer; several teachers are mixed.
    With `vocabulary` its tokenizer may be another one. Objectives on logits, hidden states and attention can be added
    up (docs/training.md lists them). All weights are trained, or LoRA adapters as in `recover`. The text is what the
    recipe's `data` steps made, or else the calibration text.

    Source: Hinton et al., arXiv 1503.02531; every objective names its own.
    """

    title: ClassVar[str] = "distill"

    teacher: str | tuple[str, ...] = Field(
        "original",
        description="`original` (the model before compression), a Hub id or a folder with the same tokenizer; a list: "
        "their mixture",
    )
    weights: tuple[float, ...] = Field((), description="weights of several teachers; empty: equal")
    gate: Gate = Field(
        "fixed",
        description="of several teachers: fixed weights; times exp(-entropy) at each token; or as the prior of "
        "Bayesian model averaging",
    )
    objective: dict[str, dict[str, Any]] = Field(
        {"kl": {}}, description="objectives with their options, which are added up"
    )
    vocabulary: Literal["same", "sorted", "matched"] = Field(
        "same",
        description="of a teacher with another tokenizer, which reads the same text: same: refused; sorted: "
        "probabilities without their tokens, for `universal_logit`; matched: tokens that both spell alike, and all "
        "others together",
    )
    stored: Stored | None = Field(
        None, description="store the teacher's distributions on disk and read them from there"
    )
    on_policy: OnPolicy | None = Field(None, description="text that is generated during training")

    @field_validator("teacher", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("objective")
    @classmethod
    def _known(cls, named: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        objectives_of(named)
        return named

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        objectives = objectives_of(self.objective)
        found = (self._about_teachers(objectives), self._about_vocabulary(objectives), self._about_text(objectives))
        for problem in found:
            if problem:
                raise ValueError(problem)
        return self

    def _about_teachers(self, objectives: list[Objective]) -> str | None:
        names = self.teachers()
        if not names:
            return "name at least one teacher"
        if self.weights and len(self.weights) != len(names):
            return f"{len(names)} teachers have {len(self.weights)} weights"
        if any(weight <= 0 for weight in self.weights):
            return "every teacher needs a weight above zero"
        if len(names) == 1 and self.gate != "fixed":
            return "`gate` applies to several teachers"
        live = any(isinstance(each, FeatureObjective | Mutual) for each in objectives)
        learns = next((each for each in objectives if isinstance(each, Mutual)), None)
        if learns and len([each for each in objectives if each.needs_teacher()]) > 1:
            return "a model that learns along teaches by `mutual` alone: remove the other objectives"
        if len(names) > 1 and (live or self.stored or self._by_teacher(objectives)):
            return "several teachers can teach by their logits on given text only, and cannot be stored"
        if self.stored and (live or self.on_policy):
            return "a stored teacher knows its logits on given text only: remove `stored`"
        if self.stored and any(isinstance(each, UniversalLogit) for each in objectives):
            return "what is stored of a teacher is not sorted over the vocabulary: remove `stored`"
        if self.stored:
            temperature_of(objectives)
        return None

    def _about_vocabulary(self, objectives: list[Objective]) -> str | None:
        taught = [each for each in objectives if each.needs_teacher()]
        if self.vocabulary == "same":
            return None
        fits = UniversalLogit if self.vocabulary == "sorted" else Divergence
        if not taught or not all(isinstance(each, fits) and not each.takes_both() for each in taught):
            wanted = "`universal_logit`" if self.vocabulary == "sorted" else "divergences of logits such as `kl`"
            return f"`vocabulary: {self.vocabulary}` is for {wanted}: change the objective"
        if len(self.teachers()) > 1 or self.stored or self._by_teacher(objectives):
            return "a teacher with another vocabulary is one model that reads what others write: remove `vocabulary`"
        if self.vocabulary == "matched":
            temperature_of(objectives)
        return None

    def _about_text(self, objectives: list[Objective]) -> str | None:
        if self.on_policy is None:
            for each in objectives:
                if each.takes_both() or isinstance(each, MiniLLM):
                    return f"{type(each).__name__} learns from text that the student writes: set `on_policy`"
            learns = any(each.needs_teacher() or isinstance(each, Exits) for each in objectives)
            return (
                None if learns else "no objective reads the teacher: set `on_policy: {by: teacher}`, or use `recover`"
            )
        if self.on_policy.adaptive and not self.training.validation:
            return "`adaptive` needs validation samples: set `training.validation` above 0"
        if self.on_policy.by == "teacher":
            both = any(each.takes_both() or isinstance(each, MiniLLM) for each in objectives)
            return "this objective needs text that the student writes: remove `by: teacher`" if both else None
        if any(not each.needs_teacher() and not isinstance(each, Exits) for each in objectives):
            return "cross-entropy on the student's own text teaches nothing: remove it, or set `by: teacher`"
        mixed = [each for each in objectives if isinstance(each, Divergence | UniversalLogit | Exits)]
        if any(each.weight < 1 and not each.takes_both() for each in mixed):
            return "cross-entropy on the student's own text teaches nothing: set `weight: 1` in the objective"
        return None

    def _by_teacher(self, objectives: list[Objective]) -> bool:
        """Whether it writes text."""
        return self.on_policy is not None and (
            self.on_policy.by == "teacher" or any(each.mixes() > 0 for each in objectives)
        )

    @override
    def teachers(self) -> tuple[str, ...]:
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher

    @property
    @override
    def teacher_dtype(self) -> torch.dtype:
        """float32 where it learns along, and where it is asked once for every precision."""
        learns = any(isinstance(each, Mutual) for each in objectives_of(self.objective))
        return torch.float32 if learns or self.stored else self.training.frozen_dtype

    @override
    def maps_vocabulary(self) -> bool:
        return self.vocabulary != "same"

    @override
    def lesson(self, whole: WholeModel, data: IndexedSamples) -> Lesson:
        objectives, names = objectives_of(self.objective), self.teachers()
        objective = combined(objectives)
        teacher: Teacher
        if self.stored is not None:
            store = store_of(whole, names[0], self.stored, temperature=temperature_of(objectives))
            teacher = stored(store, named_teacher(whole, names[0], self.teacher_dtype), data)
        elif self.vocabulary != "same":
            temperature = temperature_of(objectives)
            teacher = teacher_of_other_vocabulary(
                whole, names[0], self.vocabulary, temperature=temperature, dtype=self.teacher_dtype
            )
        else:
            teacher = ensemble(whole, names, weights=self.weights, gate=self.gate, dtype=self.teacher_dtype)
            if isinstance(teacher, EnsembleTeacher):
                tell_calibration(whole, names, teacher, data)
        return Lesson(objective, teacher, self._sampler(objective, teacher, whole.model))

    def _sampler(self, objective: Objective, teacher: Teacher, student: PreTrainedModel) -> Sampler | None:
        if self.on_policy is None:
            return None
        writer = Writer(self.on_policy, teacher, objective.mixes(), _stop_tokens(student))
        if self.on_policy.adaptive:
            return AdaptiveSampler(writer, steps=self.training.steps, beside=objective.takes_both())
        return FractionSampler(writer, beside=objective.takes_both())


def _stop_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Those that end a text."""
    ends = None if model.generation_config is None else model.generation_config.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or [])
