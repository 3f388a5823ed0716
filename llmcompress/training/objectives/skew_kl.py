"""Skew Kullback-Leibler divergence, forward or reverse: to a mixture, so that no ratio of probabilities explodes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from typing_extensions import override

from llmcompress.training.objectives.base import OBJECTIVES
from llmcompress.training.objectives.divergence import Divergence
from llmcompress.training.objectives.jsd import mixed
from llmcompress.training.objectives.kl import kl_terms


@OBJECTIVES.register("skew_kl")
class SkewKL(Divergence):
    """forward: KL(teacher ‖ α · teacher + (1 - α) · student); reverse: KL(student ‖ α · student + (1 - α) · teacher).

    Source: Ko et al., arXiv 2402.03898, section 3.1 (DistiLLM). Differs: the teacher's entropy is not dropped, so the
    value is a divergence.
    """

    direction: Literal["forward", "reverse"] = "forward"
    """The divergence that α = 0 would give."""
    skew: float = Field(default=0.1, gt=0, lt=1)
    """α; 0.1 is the paper's."""

    @override
    def terms(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.direction == "forward":
            return skew_terms(teacher, student, self.skew)
        return skew_terms(student, teacher, self.skew)

    @override
    def samples_suffice(self) -> bool:
        return self.direction == "forward"


def skew_terms(of: Tensor, to: Tensor, skew: float) -> Tensor:
    """What each event adds to KL(of ‖ skew · of + (1 - skew) · to), from log-probabilities."""
    return kl_terms(of, mixed(of, to, skew))
