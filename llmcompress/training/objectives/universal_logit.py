"""Distillation across vocabularies: sorted probabilities are compared, whichever tokens they belong to.

R = rows (positions of all samples), V = the student's vocabulary, W = the teacher's.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from llmcompress.training.data.batch import IGNORED
from llmcompress.training.objectives.base import OBJECTIVES, TokenObjective
from llmcompress.training.targets import OtherVocabulary, TeacherRows


@OBJECTIVES.register("universal_logit")
class UniversalLogit(TokenObjective):
    """weight · Σ |sorted probabilities of the student - of the teacher| + (1 - weight) · cross-entropy, in nats.

    The sum is the Wasserstein distance between the two distributions when all tokens are equally far from each other
    and may be matched freely; the shorter list is padded with zeros. Positions at which the two tokenizers have not
    read the same text add their cross-entropy alone.

    Source: Boizard et al., arXiv 2402.12030, equations 3–5 (ULD). Differs: its λ = 1.5 beside an unweighted
    cross-entropy is `weight` 0.6; predictions are paired where both have read the same text, not by their number.
    """

    weight: float = Field(default=0.6, ge=0, le=1)
    """Weight of the distance; the rest is cross-entropy with the targets. 0.6 is the paper's."""

    @override
    def needs_teacher(self) -> bool:
        return True

    @override
    def per_token(self, student_RV: Tensor, targets_R: Tensor, teacher: TeacherRows | None) -> Tensor:
        if isinstance(teacher, OtherVocabulary):
            distance_R = _distance(student_RV, teacher.logits_RW).where(teacher.known_R, 0.0)
        else:
            assert isinstance(teacher, Tensor), "sorted probabilities are not stored"
            distance_R = _distance(student_RV, teacher)
        if self.weight == 1:
            return distance_R
        entropy_R = functional.cross_entropy(student_RV, targets_R, ignore_index=IGNORED, reduction="none")
        return self.weight * distance_R + (1 - self.weight) * entropy_R


def _distance(mine_RV: Tensor, theirs_RW: Tensor) -> Tensor:
    mine, theirs = (each.softmax(-1).sort(-1, descending=True).values for each in (mine_RV, theirs_RW))
    missing = mine.shape[-1] - theirs.shape[-1]
    mine, theirs = functional.pad(mine, (0, max(0, -missing))), functional.pad(theirs, (0, max(0, missing)))
    return (mine - theirs).abs().sum(-1)
