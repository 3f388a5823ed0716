"""Training objectives: small registered classes, computed on a few rows of logits at a time.

R = rows (positions of all samples of a batch), V = vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmcompress.registry import Registry
from llmcompress.training.data.batch import IGNORED, Batch
from llmcompress.training.head import Predictions

PerToken = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Student's logits R×V, targets R, teacher's logits R×V or None → a loss for every row."""


@dataclass(frozen=True)
class ObjectiveInputs:
    """One batch as an objective receives it."""

    step: int
    """1, 2, …; 0 in validation."""
    batch: Batch
    student: Predictions
    teacher: Predictions | None
    rows_at_once: int
    """How many rows may have float32 logits at the same time."""

    def mean_over_tokens(self, per_token: PerToken) -> Tensor:
        """The mean over the tokens to be predicted of a loss that looks at each of them alone; 0 if there are none.

        Where the logits of all rows are too large, they are computed for a few rows at a time, and once more in the
        backward pass: the result and its gradient are the same up to the order of the sums.
        """
        targets_R = self.batch.targets_BT.flatten()
        taught = self.teacher
        if len(targets_R) <= self.rows_at_once:
            rows = self.student.logits(self.student.values_RX)
            teacher = None if taught is None else taught.logits(taught.values_RX)
            with torch.autocast(rows.device.type, enabled=False):
                losses_R = per_token(rows, targets_R, teacher)
            return torch.where(targets_R != IGNORED, losses_R, 0.0).sum() / max(self.batch.predicted, 1)
        chosen = (targets_R != IGNORED).nonzero().flatten()
        parts = torch.split(chosen, self.rows_at_once)
        values = torch.split(self.student.values_RX[chosen], self.rows_at_once)
        total = self.student.values_RX.new_zeros((), dtype=torch.float32)
        for part, mine in zip(parts, values, strict=True):
            theirs = None if taught is None else taught.values_RX[part]
            total = total + checkpoint(
                self._sum, per_token, mine, targets_R[part], theirs, use_reentrant=False, preserve_rng_state=False
            )
        return total / max(len(chosen), 1)

    def _sum(self, per_token: PerToken, values: Tensor, targets_R: Tensor, theirs: Tensor | None) -> Tensor:
        teacher = None if theirs is None or self.teacher is None else self.teacher.logits(theirs)
        rows = self.student.logits(values)
        with torch.autocast(rows.device.type, enabled=False):
            return per_token(rows, targets_R, teacher).sum()


class Objective(ABC):
    """A training loss, instead of or in addition to the cross-entropy."""

    def needs_teacher(self) -> bool:
        """Whether `ObjectiveInputs.teacher` is read."""
        return False

    @abstractmethod
    def loss(self, inputs: ObjectiveInputs) -> Tensor:
        """The mean over the tokens to be predicted in this batch."""

    def state(self) -> dict[str, Tensor]:
        """State for resuming, besides weights and random states."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 (most have no state)
        """Restore what `state` returned."""


class TokenObjective(BaseModel, Objective):
    """A loss computed for each token independently. The fields are the options."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @abstractmethod
    def per_token(self, student_RV: Tensor, targets_R: Tensor, teacher_RV: Tensor | None) -> Tensor:
        """A loss for every row. Rows whose target is `IGNORED` may be given; what is returned for them is dropped."""

    def loss(self, inputs: ObjectiveInputs) -> Tensor:
        """The mean of `per_token`."""
        return inputs.mean_over_tokens(self.per_token)


OBJECTIVES: Registry[Objective] = Registry("objective", "llmcompress.training.objectives")
