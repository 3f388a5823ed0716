"""What a teacher says about some tokens: logits over the vocabulary, or what a file kept of its distribution.

R = rows (tokens to be predicted), V = vocabulary, K = tokens kept for each row, W = another vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

Terms = Callable[[Tensor, Tensor], Tensor]
"""Log-probabilities of student and teacher for the same events → what each event adds to their divergence."""


@dataclass(frozen=True)
class StoredRows(ABC):
    """Some tokens of each row with the teacher's log-probabilities."""

    ids_RK: Tensor
    log_probs_RK: Tensor
    temperature: float
    """Temperature of the teacher's distribution; a student is compared at the same one."""

    sampled: ClassVar[bool] = False
    """Whether the tokens were drawn: only means over the teacher's tokens can be estimated then."""

    @abstractmethod
    def divergence(self, student_RV: Tensor, terms: Terms) -> Tensor:
        """R, from the student's log-probabilities over the whole vocabulary."""


@dataclass(frozen=True)
class TopTokens(StoredRows):
    """The most likely tokens; all others together are one more event.

    A divergence over these events is never larger than the full one, and zero where the two distributions agree.
    """

    tail_R: Tensor
    """Log-probability of all other tokens together."""

    @override
    def divergence(self, student_RV: Tensor, terms: Terms) -> Tensor:
        of_others = student_RV.scatter(-1, self.ids_RK, float("-inf")).logsumexp(-1, keepdim=True)
        student = torch.cat([student_RV.gather(-1, self.ids_RK), of_others], -1)
        # stored in 16 bits, they sum to one only nearly
        teacher = torch.cat([self.log_probs_RK, self.tail_R[:, None]], -1).to(student).log_softmax(-1)
        return terms(student, teacher).sum(-1)


@dataclass(frozen=True)
class MatchedTokens(TopTokens):
    """Tokens that another vocabulary spells alike; all others together are one more event."""

    known_R: Tensor
    """Where student and teacher have read the same text; elsewhere there is nothing to compare."""

    @override
    def divergence(self, student_RV: Tensor, terms: Terms) -> Tensor:
        return super().divergence(student_RV, terms).where(self.known_R, 0.0)


@dataclass(frozen=True)
class SampledTokens(StoredRows):
    """Tokens drawn from the teacher: the mean over them is an unbiased estimate, of the divergence and its gradient.

    Source: Anshumann et al., arXiv 2503.16870 (random sampling; the most likely tokens alone are a biased target).
    """

    sampled: ClassVar[bool] = True

    @override
    def divergence(self, student_RV: Tensor, terms: Terms) -> Tensor:
        teacher = self.log_probs_RK.to(student_RV)
        return (terms(student_RV.gather(-1, self.ids_RK), teacher) / teacher.exp()).mean(-1)


@dataclass(frozen=True)
class OtherVocabulary:
    """Logits over another vocabulary than the student's."""

    logits_RW: Tensor
    known_R: Tensor
    """Where student and teacher have read the same text; elsewhere the logits mean nothing."""


TeacherRows = Tensor | StoredRows | OtherVocabulary
"""Logits R×V, stored or matched rows, or logits of another vocabulary."""
