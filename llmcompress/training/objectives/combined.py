"""A sum of objectives: logits together with features, for instance."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.training.features import Wanted
from llmcompress.training.objectives.base import Objective, ObjectiveInputs
from llmcompress.training.teacher import Teacher


class Combined(Objective):
    """The sum of several objectives, each with the weight that its options say."""

    def __init__(self, objectives: Sequence[Objective]) -> None:
        self._each = tuple(objectives)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self._each))

    @override
    def needs_teacher(self) -> bool:
        return any(each.needs_teacher() for each in self._each)

    @override
    def observes(self) -> Wanted:
        wanted = [each.observes() for each in self._each]
        return Wanted(any(each.hidden for each in wanted), any(each.attention for each in wanted))

    @override
    def begin(self, student: PreTrainedModel, teacher: Teacher | None) -> list[nn.Parameter]:
        return [parameter for each in self._each for parameter in each.begin(student, teacher)]

    @override
    def mixes(self) -> float:
        return max(each.mixes() for each in self._each)

    @override
    def takes_both(self) -> bool:
        return any(each.takes_both() for each in self._each)

    @override
    def loss(self, inputs: ObjectiveInputs) -> Tensor:
        first, *others = (each.loss(inputs) for each in self._each)
        return sum(others, first)
