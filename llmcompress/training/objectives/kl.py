"""Distillation of logits: the divergence between the teacher's and the student's next-token distributions.

R = rows, V = vocabulary.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from llmcompress.errors import CompressError, ExitCode
from llmcompress.training.data.batch import IGNORED
from llmcompress.training.objectives.base import OBJECTIVES, TokenObjective


@OBJECTIVES.register("kl")
class KL(TokenObjective):
    """weight · τ² · KL at temperature τ + (1 - weight) · cross-entropy, in nats.

    Source: Hinton et al., arXiv 1503.02531, section 2 (τ² keeps the gradient's size at every temperature).
    """

    direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(teacher ‖ student), covers all that the teacher says; reverse: KL(student ‖ teacher), seeks its
    modes."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of both distributions."""
    weight: float = Field(default=1.0, ge=0, le=1)
    """Weight of the divergence; the rest is cross-entropy with the targets."""

    @override
    def needs_teacher(self) -> bool:
        return True

    @override
    def per_token(self, student_RV: Tensor, targets_R: Tensor, teacher_RV: Tensor | None) -> Tensor:
        assert teacher_RV is not None, "the training loop sees to a teacher"
        if teacher_RV.shape != student_RV.shape:
            raise CompressError(
                "training.vocabulary",
                f"teacher and student vocabularies differ: {teacher_RV.shape[-1]} and {student_RV.shape[-1]} tokens",
                fix="use a teacher with the same tokenizer",
                exit_code=ExitCode.USAGE,
            )
        student = functional.log_softmax(student_RV / self.temperature, -1)
        teacher = functional.log_softmax(teacher_RV / self.temperature, -1)
        of, to = (teacher, student) if self.direction == "forward" else (student, teacher)
        # functional.kl_div(input, target) is KL(target ‖ input)
        divergence_R = functional.kl_div(to, of, reduction="none", log_target=True).sum(-1)
        loss_R = self.weight * self.temperature**2 * divergence_R
        if self.weight == 1:
            return loss_R
        entropy_R = functional.cross_entropy(student_RV, targets_R, ignore_index=IGNORED, reduction="none")
        return loss_R + (1 - self.weight) * entropy_R
