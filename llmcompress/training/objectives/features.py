"""What objectives on features share: a teacher in memory, and a map of layers. B = samples, T = tokens."""

from __future__ import annotations

from abc import abstractmethod

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.training.data.batch import IGNORED, Batch
from llmcompress.training.features import Features
from llmcompress.training.objectives.base import Objective, ObjectiveInputs
from llmcompress.training.objectives.layer_map import Layers, layer_pairs
from llmcompress.training.origin import kept_blocks
from llmcompress.training.teacher import Teacher, live


class FeatureObjective(BaseModel, Objective):
    """A loss on what happens inside student and teacher at the positions that predict something."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    factor: float = Field(default=1.0, gt=0)
    """What the loss is multiplied by, where it is added to others."""
    layers: Layers = "last"
    """uniform: student layers at equal steps through the teacher, the last with the last; last: that pair alone; kept:
    each with the one that it was before `depth`, for a student made from this teacher; or pairs STUDENT: TEACHER,
    counted from 0."""

    _kept: dict[int, int] = PrivateAttr(default_factory=dict)

    @override
    def needs_teacher(self) -> bool:
        return True

    @override
    def begin(self, student: PreTrainedModel, teacher: Teacher | None) -> list[nn.Parameter]:
        self._find_layers(student, live(teacher, f"{self!r}").model)
        return []

    def _find_layers(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        if self.layers == "kept":
            self._kept.update(kept_blocks(student, teacher))

    def numbers(self, student: int, teacher: int) -> list[tuple[int, int]]:
        """Pairs of layer numbers, for models of so many layers."""
        return layer_pairs(self._kept if self.layers == "kept" else self.layers, student, teacher)

    @abstractmethod
    def value(self, student: Features, teacher: Features, batch: Batch) -> Tensor:
        """The loss, before `factor`."""

    @override
    def loss(self, inputs: ObjectiveInputs) -> Tensor:
        taught = None if inputs.teacher is None else inputs.teacher.features
        assert inputs.features is not None and taught is not None, "the training loop sees to them"
        device = inputs.batch.ids_BT.device
        with torch.autocast(device.type, enabled=False):
            return self.factor * self.value(inputs.features, taught, inputs.batch)

    def pairs(self, student: list[Tensor], teacher: list[Tensor]) -> list[tuple[int, Tensor, Tensor]]:
        """The student's layer and what is compared, in float32 at least."""
        numbers = self.numbers(len(student), len(teacher))
        return [(of, at_least_float32(student[of]), at_least_float32(teacher[to])) for of, to in numbers]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Losses are not computed in 16 bits."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def mean_over_predicting(values_BT: Tensor, batch: Batch) -> Tensor:
    """The mean over positions that predict something; 0 if there are none."""
    return torch.where(batch.targets_BT != IGNORED, values_BT, 0.0).sum() / max(batch.predicted, 1)
