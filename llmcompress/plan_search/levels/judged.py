"""A text on which candidates are judged, with what the dense model predicts there. N = windows, P = predictions of a
window, R = rows (predictions of some windows, one after the other), K = top tokens, V = vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llmcompress.evaluation.divergence import divergences
from llmcompress.numerics.likely import top_tokens
from llmcompress.training.head import Predictions

TOP = 512
"""Tokens whose probability is compared one by one; all others count as one. Source: anchors of EvoPress's runs on
cached logits; the divergence on so many is as good as the full one."""

_ROWS_BYTES = 2**25
"""Float32 logits at a time: enough rows to multiply fast, few enough to stay near the processor."""


@dataclass(frozen=True, eq=False)
class JudgedText:
    """Windows of equal length without padding; the last token of each is not run, nothing is predicted from it."""

    windows_NT: Tensor
    batches: tuple[Tensor, ...]
    """The same in batches, without the last token."""
    ids: tuple[Tensor, ...]
    """Batch by batch, R×K int32: the tokens that the dense model holds most likely."""
    logprobs: tuple[Tensor, ...]
    """Their log-probabilities, float32."""

    @property
    def tokens(self) -> int:
        """Tokens that pass through the model."""
        return self.windows_NT[:, 1:].numel()

    @cached_property
    def key(self) -> str:
        """Of the windows."""
        return key_of(self.windows_NT)

    def divergences(self, batch: int, predicted: Predictions) -> Tensor:
        """Mean KL(dense ‖ other) of every window of a batch, float64 on the CPU."""
        return torch.cat(list(self.parts(batch, predicted))).reshape(len(self.batches[batch]), -1).mean(-1).cpu()

    def parts(self, batch: int, predicted: Predictions) -> Iterator[Tensor]:
        """KL(dense ‖ other) of every prediction of a batch, some rows at a time, with gradients where enabled."""
        size = _rows(predicted)
        values, ids, logprobs = (
            torch.split(each, size) for each in (predicted.values_RX, self.ids[batch], self.logprobs[batch])
        )
        for rows, ids_QK, dense_QK in zip(values, ids, logprobs, strict=True):
            yield divergences(dense_QK, _log_probabilities(predicted, rows, ids_QK))


def key_of(windows_NT: Tensor) -> str:
    """A hash of token ids and their shape."""
    return hashlib.sha256(
        repr(tuple(windows_NT.shape)).encode() + windows_NT.contiguous().numpy().tobytes()
    ).hexdigest()


def dense_top(predicted: Predictions) -> tuple[Tensor, Tensor]:
    """What is kept of the dense model's predictions: token ids and log-probabilities, R×K."""
    parts = []
    for rows in torch.split(predicted.values_RX, _rows(predicted)):
        logits_QV = predicted.logits(rows)
        ids_QK = top_tokens(logits_QV, min(TOP, logits_QV.shape[-1]))[1]
        parts.append((ids_QK.int(), logits_QV.gather(-1, ids_QK) - logits_QV.logsumexp(-1, keepdim=True)))
    ids, logprobs = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(logprobs)


def judged(windows_NT: Tensor, batches: Sequence[Tensor], found: Sequence[tuple[Tensor, Tensor]]) -> JudgedText:
    """From what `dense_top` gave for every batch."""
    ids, logprobs = zip(*found, strict=True)
    return JudgedText(windows_NT, tuple(batches), ids, logprobs)


def _log_probabilities(predicted: Predictions, rows_QX: Tensor, ids_QK: Tensor) -> Tensor:
    logits_QV = predicted.logits(rows_QX)
    return logits_QV.gather(-1, ids_QK.long()) - logits_QV.logsumexp(-1, keepdim=True)


def _rows(predicted: Predictions) -> int:
    with torch.no_grad():
        vocabulary = predicted.logits(predicted.values_RX[:1]).shape[-1]
    return max(1, _ROWS_BYTES // (4 * vocabulary))
