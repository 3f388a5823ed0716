"""Online distillation: two models learn together, each from the text and from what the other predicts.

R = rows (positions of all samples), V = vocabulary.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.training.data.batch import IGNORED
from llmcompress.training.objectives.base import OBJECTIVES, ObjectiveInputs, TokenObjective
from llmcompress.training.objectives.divergence import require_same_vocabulary
from llmcompress.training.objectives.kl import kl_terms
from llmcompress.training.targets import TeacherRows
from llmcompress.training.teacher import Teacher, live


@OBJECTIVES.register("mutual")
class Mutual(TokenObjective):
    """For each of two models: cross-entropy with the text + weight · KL(the other ‖ it), the other one held fixed.

    The other model is the `teacher`; all of its weights are trained along, and dropped with it afterwards. With
    `weight: 0` both train as if alone.

    Source: Zhang et al., arXiv 1706.00384, equations 4–6 (deep mutual learning). Differs: both take their step from
    the same predictions, instead of one after the other.
    """

    weight: float = Field(default=1.0, ge=0)
    """Weight of the divergence."""

    @override
    def needs_teacher(self) -> bool:
        return True

    @override
    def begin(self, student: PreTrainedModel, teacher: Teacher | None) -> list[nn.Parameter]:
        return live(teacher, "mutual learning").learn()

    @override
    def loss(self, inputs: ObjectiveInputs) -> Tensor:
        return inputs.mean_over_tokens(self._both if inputs.step else self.per_token)

    @override
    def per_token(self, student_RV: Tensor, targets_R: Tensor, teacher: TeacherRows | None) -> Tensor:
        """The student's part, for validation."""
        assert isinstance(teacher, Tensor), "the other one is a model"
        require_same_vocabulary(student_RV, teacher)
        return self._one(student_RV, teacher, targets_R)

    def _both(self, student_RV: Tensor, targets_R: Tensor, teacher: TeacherRows | None) -> Tensor:
        assert isinstance(teacher, Tensor), "the other one is a model"
        return self.per_token(student_RV, targets_R, teacher) + self._one(teacher, student_RV, targets_R)

    def _one(self, mine_RV: Tensor, theirs_RV: Tensor, targets_R: Tensor) -> Tensor:
        entropy_R = functional.cross_entropy(mine_RV, targets_R, ignore_index=IGNORED, reduction="none")
        theirs_RV, mine_RV = (functional.log_softmax(each, -1) for each in (theirs_RV.detach(), mine_RV))
        return entropy_R + self.weight * kl_terms(theirs_RV, mine_RV).sum(-1)
