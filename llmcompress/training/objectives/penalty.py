"""A penalty added to another objective: on gates, on weight norms, on anything that is not per token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.training.objectives.base import Objective, ObjectiveInputs


class Penalty(ABC):
    """A term added to the loss."""

    @abstractmethod
    def value(self, step: int) -> Tensor:
        """Of step 1, 2, …, with its graph."""

    def state(self) -> dict[str, Tensor]:
        """State for resuming."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 (most have no state)
        """Restore what `state` returned."""


class Penalised(Objective):
    """The sum of an objective and a penalty. In validation (step 0) there is no penalty."""

    def __init__(self, objective: Objective, penalty: Penalty) -> None:
        self._objective, self._penalty = objective, penalty

    def __repr__(self) -> str:
        return f"{self._objective!r} + {type(self._penalty).__name__}"

    @override
    def needs_teacher(self) -> bool:
        return self._objective.needs_teacher()

    @override
    def loss(self, inputs: ObjectiveInputs) -> Tensor:
        plain = self._objective.loss(inputs)
        if not inputs.step:
            return plain
        with torch.autocast(plain.device.type, enabled=False):
            return plain + self._penalty.value(inputs.step)

    @override
    def state(self) -> dict[str, Tensor]:
        return self._penalty.state()

    @override
    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._penalty.restore(state)
