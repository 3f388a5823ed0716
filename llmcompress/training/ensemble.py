"""Several teachers as one: a mixture of their distributions.

M = teachers, R = rows, V = vocabulary, B = samples, T = tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from llmcompress.errors import CompressError, ExitCode
from llmcompress.numerics.calibration_error import expected_calibration_error
from llmcompress.training.data.batch import IGNORED, Batch
from llmcompress.training.features import Wanted
from llmcompress.training.head import rows_at_once
from llmcompress.training.targets import TeacherRows
from llmcompress.training.teacher import Teacher, TeacherPredictions

Gate = Literal["fixed", "entropy", "posterior"]


class EnsembleTeacher:
    """Σ weight · probability over the teachers; probabilities are averaged, not logits.

    `gate` decides the weights, on top of `weights` (all equal by default):
    fixed: nothing else; this with samples of a posterior over weights is the Bayesian predictive distribution.
    entropy: times exp(-entropy) of each teacher's distribution at that token, so that a sure teacher counts more.
    posterior: Bayesian model averaging. `weights` are the prior, and each teacher's likelihood of the tokens so far in
    the sample makes it the posterior, at every token.

    Source: Vadera et al., arXiv 2005.08110 (posterior expectation); Hoeting et al., Statistical Science 14 (1999),
    equation 1 (model averaging).
    """

    def __init__(self, teachers: Sequence[Teacher], *, weights: Sequence[float] = (), gate: Gate = "fixed") -> None:
        assert teachers, "an ensemble has members"
        self._teachers, self._gate = tuple(teachers), gate
        self._prior_M = torch.tensor(weights or [1.0] * len(teachers), dtype=torch.float32)
        if len(self._prior_M) != len(teachers) or not bool((self._prior_M > 0).all()):
            raise CompressError(
                "training.weights",
                f"{len(teachers)} teachers have the weights {list(weights)}",
                where="weights",
                fix="give every teacher one weight above zero",
                exit_code=ExitCode.USAGE,
            )

    @property
    def vocabulary(self) -> int | None:
        """The smallest that a member cuts to."""
        return min((each.vocabulary for each in self._teachers if each.vocabulary is not None), default=None)

    @property
    def members(self) -> tuple[Teacher, ...]:
        """The teachers, in their order."""
        return self._teachers

    def predictions(self, batch: Batch, wanted: Wanted) -> TeacherPredictions:
        """Every member's; the values are row numbers, with the posterior where there is one."""
        said = [_Member(each.predictions(batch, Wanted()), self.vocabulary) for each in self._teachers]
        targets_R = batch.targets_BT.flatten()
        numbers_R1 = torch.arange(len(targets_R), device=targets_R.device)[:, None]
        prior_M = (self._prior_M / self._prior_M.sum()).log().to(targets_R.device)
        weights_RM = prior_M.expand(len(targets_R), -1)
        if self._gate == "posterior":
            weights_RM = functional.log_softmax(weights_RM + _evidence(said, batch), -1)

        def rows(values_R1: Tensor) -> TeacherRows:
            numbers_R = values_R1[:, 0]
            each_MRV = torch.stack([one.log_probs(numbers_R) for one in said])
            gates_MR = weights_RM[numbers_R].T
            if self._gate == "entropy":
                gates_MR = functional.log_softmax(gates_MR + (each_MRV.exp() * each_MRV).sum(-1), 0)
            return (each_MRV + gates_MR[..., None]).logsumexp(0)

        return TeacherPredictions(numbers_R1, rows)


@torch.no_grad()
def calibration_error(teacher: Teacher, batch: Batch) -> float:
    """How far the confidence of its likeliest tokens is from how often they come, on the predicted tokens of a batch.

    Source: Vadera et al., arXiv 2005.08110, section 5 (a Bayesian ensemble is judged by its calibration).
    """
    said = _Member(teacher.predictions(batch, Wanted()), teacher.vocabulary)
    targets_R = batch.targets_BT.flatten()
    confidence, right, width = list[Tensor](), list[Tensor](), 1
    chosen = (targets_R != IGNORED).nonzero().flatten()
    while len(chosen):
        part, chosen = chosen[:width], chosen[width:]
        log_probs_RV = said.log_probs(part)
        best_R, at_R = log_probs_RV.max(-1)
        confidence.append(best_R.exp())
        right.append(at_R == targets_R[part])
        width = rows_at_once(log_probs_RV.shape[-1])
    return expected_calibration_error(torch.cat(confidence), torch.cat(right))


@dataclass(frozen=True)
class _Member:
    """What one teacher says."""

    said: TeacherPredictions
    vocabulary: int | None

    def log_probs(self, numbers_R: Tensor) -> Tensor:
        logits_RV = self.said.rows(self.said.values_RX[numbers_R])
        if not isinstance(logits_RV, Tensor):
            raise CompressError(
                "training.stored-ensemble",
                "what is stored of a teacher cannot be mixed with others",
                fix="use models as the teachers of an ensemble",
                exit_code=ExitCode.USAGE,
            )
        return functional.log_softmax(logits_RV[:, : self.vocabulary], -1)


def _evidence(said: Sequence[_Member], batch: Batch) -> Tensor:
    """R×M: log-likelihood of the tokens before the predicted one in the sample, those that were targets."""
    targets_R = batch.targets_BT.flatten()
    columns = []
    for one in said:
        of_R = torch.zeros(len(targets_R), device=targets_R.device)
        chosen = (targets_R != IGNORED).nonzero().flatten()
        width = 1
        while len(chosen):
            part, chosen = chosen[:width], chosen[width:]
            log_probs_RV = one.log_probs(part)
            of_R[part] = log_probs_RV.gather(-1, targets_R[part, None])[:, 0]
            width = rows_at_once(log_probs_RV.shape[-1])
        of_BT = of_R.view_as(batch.targets_BT)
        columns.append((of_BT.cumsum(1) - of_BT).flatten())
    return torch.stack(columns, -1)
