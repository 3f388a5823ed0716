"""Metrics computed from token scores, window by window; several share one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import torch

from llmcompress.errors import CompressError
from llmcompress.evaluation.bootstrap import Bootstrap
from llmcompress.evaluation.confidence import calibration_error, calibration_sums
from llmcompress.evaluation.scores import WindowScores
from llmcompress.evaluation.texts import EvaluationText
from llmcompress.records.measurements import Measurement, PerplexityResult, Which


class Reduction(Protocol):
    """A metric that is being accumulated."""

    def add(self, scores: WindowScores) -> None:
        """Add the scores of the next window."""

    def result(self) -> Measurement:
        """The result over all windows so far."""


class Perplexity:
    """exp of the mean negative log-likelihood over all predicted tokens, each token with the same weight."""

    def __init__(self, text: EvaluationText, *, of: Which = "model", from_cache: bool = False) -> None:
        self._text, self._of, self._from_cache = text, of, from_cache
        self._windows: list[WindowScores] = []
        self._nats, self._tokens = 0.0, 0

    def add(self, scores: WindowScores) -> None:
        """Sums are float64."""
        self._nats -= float(scores.logprob_P.sum(dtype=torch.float64))
        self._tokens += len(scores.logprob_P)
        self._windows.append(scores)

    def result(self) -> PerplexityResult:
        """Raises: CompressError `numerics.not-finite` when it is too large for a number."""
        text, mean = self._text, self._nats / self._tokens
        if mean > math.log(torch.finfo(torch.float64).max):
            raise CompressError(
                "numerics.not-finite",
                f"{text.name}: the mean loss is {mean:.0f} nats",
                where="evaluate.perplexity",
                fix="a weight is probably damaged: evaluate the dense model alone with `llmcompress evaluate`",
            )
        samples = Bootstrap(len(self._windows))
        return PerplexityResult(
            of=self._of,
            text=text.name,
            protocol=text.protocol,
            window=text.window,
            bos=text.bos,
            tokens=self._tokens,
            text_tokens=text.text_tokens,
            perplexity=math.exp(mean),
            bits_per_byte=self._nats / math.log(2) / text.predicted_bytes,
            word_perplexity=_word_perplexity(self._nats, text.words),
            loss=samples.mean([-window.logprob_P for window in self._windows]),
            calibration_error=samples.statistic(calibration_sums(self._windows), calibration_error),
            from_cache=self._from_cache,
        )


def feed(scores: Iterable[WindowScores], *reductions: Reduction) -> None:
    """Add every window's scores to all of them, in one pass."""
    for window in scores:
        for reduction in reductions:
            reduction.add(window)


def _word_perplexity(nats: float, words: int | None) -> float | None:
    """None without words, or where it is too large for a number."""
    return math.exp(nats / words) if words and nats / words < 700 else None
