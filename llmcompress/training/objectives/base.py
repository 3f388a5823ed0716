"""Training objectives: small registered classes, computed on a few rows of logits at a time.

R = rows (positions of all samples of a batch), V = vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llmcompress.registry import Registry
from llmcompress.training.data.batch import IGNORED, Batch
from llmcompress.training.features import Features, Wanted
from llmcompress.training.head import Predictions
from llmcompress.training.row_losses import row_losses
from llmcompress.training.targets import TeacherRows
from llmcompress.training.teacher import Teacher, TeacherPredictions

PerToken = Callable[..., Tensor]
"""Student's logits R×V, targets R, the teacher's `TeacherRows` or None, and whatever else each row has → a loss for
every row."""


@dataclass(frozen=True)
class ObjectiveInputs:
    """One batch as an objective receives it."""

    step: int
    """1, 2, …; 0 in validation."""
    batch: Batch
    student: Predictions
    teacher: TeacherPredictions | None
    rows_at_once: int
    """How many rows may have float32 logits at the same time."""
    features: Features | None = None
    """What the objective asked to observe inside the student; the teacher's are in `teacher`."""
    repeated: Callable[[], Predictions] | None = None
    """The student's forward pass on this batch once more."""

    def again(self) -> Predictions:
        """What the student predicts in another forward pass, for an objective that changed something about it."""
        assert self.repeated is not None, "the training loop sees to it"
        return self.repeated()

    def mean_over_tokens(self, per_token: PerToken, *others_R: Tensor) -> Tensor:
        """The mean over the tokens to be predicted of a loss that looks at each of them alone; 0 if there are none.

        Where the rows that predict something are few, logits of the others are not computed; where their logits are
        too large, they are computed for a few rows at a time, and once more in the backward pass. The result and its
        gradient are the same up to the order of the sums. `others_R` hold more numbers of each row, which `per_token`
        gets, too.
        """
        targets_R = self.batch.targets_BT.flatten()
        if len(targets_R) <= self.rows_at_once:
            theirs = None if self.teacher is None else self.teacher.values_RX
            losses_R = self._losses(per_token, self.student.values_RX, targets_R, theirs, *others_R)
            return torch.where(targets_R != IGNORED, losses_R, 0.0).sum() / max(self.batch.predicted, 1)
        first, *more = self._parts(targets_R)
        if not more:
            return self._sum(per_token, *self._rows(first, *others_R)) / max(self.batch.predicted, 1)
        total = self.student.values_RX.new_zeros((), dtype=torch.float32)
        for part in (first, *more):
            total = total + checkpoint(
                self._sum, per_token, *self._rows(part, *others_R), use_reentrant=False, preserve_rng_state=False
            )
        return total / max(self.batch.predicted, 1)

    @torch.no_grad()
    def each_token(self, per_token: PerToken) -> Tensor:
        """What `per_token` says of every row, without a graph; 0 for rows that predict nothing."""
        targets_R = self.batch.targets_BT.flatten()
        parts = self._parts(targets_R)
        found = torch.cat([self._losses(per_token, *self._rows(part)) for part in parts])
        every = found.new_zeros(len(targets_R), *found.shape[1:])
        every[torch.cat(parts)] = found
        return every

    def _parts(self, targets_R: Tensor) -> tuple[Tensor, ...]:
        """Numbers of the rows that predict something, as many at a time as may have logits."""
        return torch.split((targets_R != IGNORED).nonzero().flatten(), self.rows_at_once)

    def _rows(self, part: Tensor, *others_R: Tensor) -> tuple[Any, ...]:
        """Everything about some rows, as `_losses` takes it."""
        theirs = None if self.teacher is None else self.teacher.values_RX[part]
        others = [each[part] for each in others_R]
        return self.student.values_RX[part], self.batch.targets_BT.flatten()[part], theirs, *others

    def _losses(
        self, per_token: PerToken, values_RX: Tensor, targets_R: Tensor, theirs: Tensor | None, *others_R: Tensor
    ) -> Tensor:
        rows_RV = self.student.logits(values_RX)

        def loss_of(some_RV: Tensor, part: slice) -> Tensor:
            teacher = None if theirs is None or self.teacher is None else self.teacher.rows(theirs[part])
            return per_token(some_RV, targets_R[part], teacher, *(each[part] for each in others_R))

        with torch.autocast(rows_RV.device.type, enabled=False):
            if any(each is not None and each.requires_grad for each in (theirs, *others_R)):
                return loss_of(rows_RV, slice(None))
            return row_losses(rows_RV, loss_of)

    def _sum(self, per_token: PerToken, *rows: Any) -> Tensor:
        return self._losses(per_token, *rows).sum()


class Objective(ABC):
    """A training loss, instead of or in addition to the cross-entropy."""

    def needs_teacher(self) -> bool:
        """Whether `ObjectiveInputs.teacher` is read."""
        return False

    def observes(self) -> Wanted:
        """What must be observed inside student and teacher."""
        return Wanted()

    def begin(self, student: PreTrainedModel, teacher: Teacher | None) -> list[nn.Parameter]:
        """Before the first step: parameters of its own that are trained with the model, and dropped with it."""
        return []

    def mixes(self) -> float:
        """The teacher's share in the distribution that on-policy text is drawn from."""
        return 0.0

    def takes_both(self) -> bool:
        """Whether it needs on-policy text beside the given text, and not in its place."""
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
    def per_token(self, student_RV: Tensor, targets_R: Tensor, teacher: TeacherRows | None) -> Tensor:
        """A loss for every row. Rows whose target is `IGNORED` may be given; what is returned for them is dropped."""

    def loss(self, inputs: ObjectiveInputs) -> Tensor:
        """The mean of `per_token`."""
        return inputs.mean_over_tokens(self.per_token)


OBJECTIVES: Registry[Objective] = Registry("objective", "llmcompress.training.objectives")
