"""Total variation distance between the teacher's and the student's distributions."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from llmcompress.training.objectives.base import OBJECTIVES
from llmcompress.training.objectives.divergence import Divergence


@OBJECTIVES.register("total_variation")
class TotalVariation(Divergence):
    """½ · Σ |teacher - student|, from 0 to 1.

    Source: Wen et al., arXiv 2307.15190, section 3 (f-DISTILL).
    """

    order: ClassVar[int] = 1

    @override
    def terms(self, student: Tensor, teacher: Tensor) -> Tensor:
        return 0.5 * (teacher.exp() - student.exp()).abs()
