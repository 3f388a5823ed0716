"""The loss of a causal language model: the negative log-likelihood of the next token. R = rows, V = vocabulary."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from llmcompress.training.data.batch import IGNORED
from llmcompress.training.objectives.base import OBJECTIVES, TokenObjective
from llmcompress.training.targets import TeacherRows


@OBJECTIVES.register("cross_entropy")
class CrossEntropy(TokenObjective):
    """-log p(target), in nats."""

    @override
    def per_token(self, student_RV: Tensor, targets_R: Tensor, teacher: TeacherRows | None) -> Tensor:
        return functional.cross_entropy(student_RV, targets_R, ignore_index=IGNORED, reduction="none")
