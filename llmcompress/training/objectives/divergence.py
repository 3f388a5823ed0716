"""Distillation of logits: a divergence between the teacher's and the student's next-token distributions.

R = rows, V = vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from llmcompress.errors import CompressError, ExitCode
from llmcompress.training.data.batch import IGNORED
from llmcompress.training.objectives.base import TokenObjective
from llmcompress.training.targets import StoredRows, TeacherRows, Terms


class Divergence(TokenObjective):
    """weight · divergence at temperature τ + (1 - weight) · cross-entropy, in nats.

    The divergence is multiplied by a power of τ that keeps the gradient's size (Hinton et al., arXiv 1503.02531,
    section 2). Every one of them is a sum over tokens, and over any other events: so stored rows need no other code.
    """

    temperature: float = Field(default=1.0, gt=0)
    """Temperature of both distributions."""
    weight: float = Field(default=1.0, ge=0, le=1)
    """Weight of the divergence; the rest is cross-entropy with the targets."""

    order: ClassVar[int] = 2
    """The divergence of nearly equal distributions grows with this power of the difference of their logits."""

    @override
    def needs_teacher(self) -> bool:
        return True

    @abstractmethod
    def terms(self, student: Tensor, teacher: Tensor) -> Tensor:
        """What each event adds, from log-probabilities."""

    def samples_suffice(self) -> bool:
        """Whether it is a mean over the teacher's tokens, which tokens drawn from it estimate without bias."""
        return False

    @override
    def per_token(self, student_RV: Tensor, targets_R: Tensor, teacher: TeacherRows | None) -> Tensor:
        loss_R = self.weight * self.divergence(student_RV, teacher, self.terms)
        if self.weight == 1:
            return loss_R
        entropy_R = functional.cross_entropy(student_RV, targets_R, ignore_index=IGNORED, reduction="none")
        return loss_R + (1 - self.weight) * entropy_R

    def divergence(self, student_RV: Tensor, teacher: TeacherRows | None, terms: Terms) -> Tensor:
        """R: of logits from what the teacher says, times the power of τ.

        Raises: CompressError where what was stored of the teacher does not suffice.
        """
        assert teacher is not None, "the training loop sees to a teacher"
        student_RV = functional.log_softmax(student_RV / self.temperature, -1)
        scale: float = self.temperature**self.order
        if isinstance(teacher, StoredRows):
            self._check(teacher)
            return scale * teacher.divergence(student_RV, terms)
        assert isinstance(teacher, Tensor), "options that do not fit together are refused"
        require_same_vocabulary(student_RV, teacher)
        return scale * terms(student_RV, functional.log_softmax(teacher / self.temperature, -1)).sum(-1)

    def _check(self, stored: StoredRows) -> None:
        if stored.temperature != self.temperature:
            raise CompressError(
                "training.temperature",
                f"the teacher's distributions are stored at temperature {stored.temperature:g}, and the objective "
                f"compares at {self.temperature:g}",
                fix="use the same temperature, or store them again in another folder",
                exit_code=ExitCode.USAGE,
            )
        if stored.sampled and not self.samples_suffice():
            raise CompressError(
                "training.sampled-teacher",
                f"{self!r} needs the teacher's probability of every token the student may say, and only tokens drawn "
                "from the teacher are stored",
                fix="store the most likely tokens (form: top), or use forward KL or forward skew KL",
                exit_code=ExitCode.USAGE,
            )


def require_same_vocabulary(student_RV: Tensor, teacher_RV: Tensor) -> None:
    """Raises: CompressError for logits of different widths."""
    if teacher_RV.shape != student_RV.shape:
        raise CompressError(
            "training.vocabulary",
            f"teacher and student vocabularies differ: {teacher_RV.shape[-1]} and {student_RV.shape[-1]} tokens",
            fix="use a teacher with the same tokenizer",
            exit_code=ExitCode.USAGE,
        )
