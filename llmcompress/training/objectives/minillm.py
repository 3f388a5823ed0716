"""MiniLLM: the policy gradient of the reverse KL divergence between whole texts.

B = samples, T = tokens, R = rows (all positions of all samples), V = vocabulary. q is the student, p the teacher.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from llmcompress.training.data.batch import IGNORED
from llmcompress.training.objectives.base import OBJECTIVES, ObjectiveInputs, TokenObjective
from llmcompress.training.objectives.divergence import require_same_vocabulary
from llmcompress.training.objectives.kl import kl_terms
from llmcompress.training.targets import TeacherRows


@OBJECTIVES.register("minillm")
class MiniLLM(TokenObjective):
    """Gradient of KL(student ‖ teacher) over texts that the student writes, plus cross-entropy on the given text.

    Of every token y of a text: the gradient of KL(q ‖ p) at that position, which is exact, minus
    R · ∇ log q(y), where R is the sum of log p/q over the tokens *after* it. Both are multiplied by the token's
    importance weight q(y) ÷ (mix · p(y) + (1 - mix) · q(y)), because the text was drawn from that mixture. The value
    is the weighted KL; the second part has value zero, and is there for its gradient.

    Source: Gu et al., arXiv 2306.08543, section 2.2 and appendix A. Differs: every text is used for one step, so there
    is nothing to clip as PPO does, and rewards are not whitened; the released code adds the token's own reward to R as
    well, which counts it twice.
    """

    mix: float = Field(default=0.2, ge=0, lt=1)
    """The teacher's share in the distribution that texts are drawn from; 0.2 is the paper's."""
    length_normalised: bool = True
    """Divide R by the number of tokens that it is a sum over, so that short texts are not preferred."""
    pretraining: float = Field(default=1.0, ge=0)
    """Weight of a token of the given text; 0: no given text in a batch."""

    @override
    def needs_teacher(self) -> bool:
        return True

    @override
    def mixes(self) -> float:
        return self.mix

    @override
    def takes_both(self) -> bool:
        return self.pretraining > 0

    @override
    def per_token(self, student_RV: Tensor, targets_R: Tensor, teacher: TeacherRows | None) -> Tensor:
        """KL(student ‖ teacher), for validation on given text."""
        student_RV, teacher_RV = _log_probs(student_RV, teacher)
        return kl_terms(student_RV, teacher_RV).sum(-1)

    @override
    def loss(self, inputs: ObjectiveInputs) -> Tensor:
        batch = inputs.batch
        if not inputs.step:
            return super().loss(inputs)
        said_R2 = inputs.each_token(_of_targets)
        student_R, teacher_R = said_R2.unbind(-1)
        counts_BT = batch.targets_BT != IGNORED
        rewards_BT = (teacher_R - student_R).view_as(batch.targets_BT)
        later_BT = _after(rewards_BT)
        if self.length_normalised:
            later_BT = later_BT / _after(counts_BT.to(later_BT)).clamp(min=1)
        weights_R = importance_weights(student_R, teacher_R, self.mix)
        return inputs.mean_over_tokens(self._either, later_BT.flatten(), weights_R, batch.generated_R)

    def _either(
        self,
        student_RV: Tensor,
        targets_R: Tensor,
        teacher: TeacherRows | None,
        later_R: Tensor,
        weights_R: Tensor,
        generated_R: Tensor,
    ) -> Tensor:
        student_RV, teacher_RV = _log_probs(student_RV, teacher)
        said_R = student_RV.gather(-1, targets_R.clamp(min=0)[:, None])[:, 0]
        own_R = kl_terms(student_RV, teacher_RV).sum(-1) - later_R * (said_R - said_R.detach())
        return torch.where(generated_R, weights_R * own_R, -self.pretraining * said_R)


def importance_weights(student_R: Tensor, teacher_R: Tensor, mix: float) -> Tensor:
    """q ÷ (mix · p + (1 - mix) · q) from log-probabilities of the tokens drawn; exactly 1 where mix is 0."""
    if mix == 0:
        return torch.ones_like(student_R)
    return (student_R - torch.logaddexp(teacher_R + math.log(mix), student_R + math.log1p(-mix))).exp()


def _after(values_BT: Tensor) -> Tensor:
    """The sum over later positions, the position itself not included."""
    return values_BT.flip(1).cumsum(1).flip(1) - values_BT


def _log_probs(student_RV: Tensor, teacher: TeacherRows | None) -> tuple[Tensor, Tensor]:
    assert isinstance(teacher, Tensor), "on-policy text needs a teacher that can read it"
    require_same_vocabulary(student_RV, teacher)
    return functional.log_softmax(student_RV, -1), functional.log_softmax(teacher, -1)


def _of_targets(student_RV: Tensor, targets_R: Tensor, teacher: TeacherRows | None) -> Tensor:
    """R×2: log q and log p of the tokens in the text."""
    index_R1 = targets_R.clamp(min=0)[:, None]
    return torch.cat([each.gather(-1, index_R1) for each in _log_probs(student_RV, teacher)], -1)
