"""Generalised Jensen-Shannon divergence: between forward and reverse KL."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from llmcompress.training.objectives.base import OBJECTIVES
from llmcompress.training.objectives.divergence import Divergence
from llmcompress.training.objectives.kl import kl_terms


@OBJECTIVES.register("jsd")
class JSD(Divergence):
    """β · KL(teacher ‖ m) + (1 - β) · KL(student ‖ m), with m = β · teacher + (1 - β) · student.

    Its value is of the order β (1 - β): divided by β it tends to forward KL as β → 0, and by 1 - β to reverse KL as
    β → 1. At exactly 0 and 1 it is those divergences themselves.

    Source: Agarwal et al., arXiv 2306.13649, equation 1 (GKD). Differs: at 0 and 1, where the formula is zero; TRL
    does the same.
    """

    beta: float = Field(default=0.5, ge=0, le=1)
    """0: forward KL; 1: reverse KL; 0.5: the symmetric divergence."""

    @override
    def terms(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.beta == 0:
            return kl_terms(teacher, student)
        if self.beta == 1:
            return kl_terms(student, teacher)
        between = mixed(teacher, student, self.beta)
        return self.beta * kl_terms(teacher, between) + (1 - self.beta) * kl_terms(student, between)

    @override
    def samples_suffice(self) -> bool:
        return self.beta == 0


def mixed(one: Tensor, other: Tensor, share: float) -> Tensor:
    """log(share · one + (1 - share) · other), of log-probabilities; 0 < share < 1."""
    return torch.logaddexp(one + math.log(share), other + math.log1p(-share))
