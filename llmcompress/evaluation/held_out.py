"""The loss on windows of the calibration text that no pass measured, before and after. N = windows, T = tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.calibration.offloading import WeightStore
from llmcompress.errors import CompressError
from llmcompress.evaluation.scores import WindowScores, score
from llmcompress.records.measurements import HeldOutLoss, Measurement
from llmcompress.runners.torch_runner import TorchRunner

MUCH_WORSE = 3.0
"""Perplexity after ÷ before from which a warning says so."""
BROKEN = 20.0
"""The same, from which the model is taken to be of no use."""


@dataclass(frozen=True)
class HeldOut:
    """The windows, if there are any, and where a model runs on them."""

    windows_NT: Tensor | None
    weights_at: WeightStore
    device: torch.device

    def dense_scores(self, model: PreTrainedModel) -> list[WindowScores]:
        """Those before any work; none where they are not finite, since the first pass names the site that overflows."""
        try:
            return self.scores(model)
        except CompressError:
            return []

    def scores(self, model: PreTrainedModel) -> list[WindowScores]:
        """Log-probabilities of all tokens; none without windows.

        Raises: CompressError `numerics.not-finite`.
        """
        if self.windows_NT is None:
            return []
        with TorchRunner(model, weights_at=self.weights_at, device=self.device) as runner:
            return list(score(runner, list(self.windows_NT), name="the held-out calibration text"))


def loss_increase(before: Sequence[WindowScores], after: Sequence[WindowScores]) -> list[HeldOutLoss]:
    """One record, or none where nothing was scored."""
    if not before or not after:
        return []
    dense, compressed = (torch.cat([window.logprob_P for window in scored]).double() for scored in (before, after))
    return [
        HeldOutLoss(
            windows=len(before),
            tokens=len(dense),
            dense=-float(dense.mean()),
            compressed=-float(compressed.mean()),
        )
    ]


def loss_warnings(measured: Sequence[Measurement]) -> list[str]:
    """What a user must know before the model is used."""
    return [_warning(each) for each in measured if isinstance(each, HeldOutLoss) and each.ratio >= MUCH_WORSE]


def _warning(loss: HeldOutLoss) -> str:
    found = (
        f"on {loss.tokens} held-out tokens of the calibration text perplexity is {loss.ratio:.3g} times that of the "
        f"dense model ({loss.compressed:.2f} against {loss.dense:.2f} nats per token)"
    )
    broken = "the compressed model is broken: " if loss.ratio >= BROKEN else ""
    return f"{broken}{found}; use more bits or smaller fractions, or recover it by training"
