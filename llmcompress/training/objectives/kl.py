"""Kullback-Leibler divergence, forward or reverse."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from typing_extensions import override

from llmcompress.training.objectives.base import OBJECTIVES
from llmcompress.training.objectives.divergence import Divergence


@OBJECTIVES.register("kl")
class KL(Divergence):
    """weight · τ² · KL at temperature τ + (1 - weight) · cross-entropy, in nats.

    Source: Hinton et al., arXiv 1503.02531, section 2.
    """

    direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(teacher ‖ student), covers all that the teacher says; reverse: KL(student ‖ teacher), seeks its
    modes."""

    @override
    def terms(self, student: Tensor, teacher: Tensor) -> Tensor:
        return kl_terms(teacher, student) if self.direction == "forward" else kl_terms(student, teacher)

    @override
    def samples_suffice(self) -> bool:
        return self.direction == "forward"


def kl_terms(of: Tensor, to: Tensor) -> Tensor:
    """What each event adds to KL(of ‖ to), from log-probabilities."""
    return of.exp() * (of - to)
