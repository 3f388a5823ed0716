"""Metrics computed from token scores, window by window; several share one pass.

P = predicted tokens of a window, K = top tokens of the dense model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from llmcompress.errors import CompressError
from llmcompress.evaluation.scores import WindowScores
from llmcompress.evaluation.texts import EvaluationText
from llmcompress.records.measurements import Divergence, Estimate, Measurement, PerplexityResult, Which

LEAST_TAIL = 2.0**-23
"""Probability of all tokens that were not looked at, at least: below, it is the rounding of float32."""


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
        self._nats, self._tokens = 0.0, 0

    def add(self, scores: WindowScores) -> None:
        """Sums are float64."""
        self._nats -= float(scores.logprob_P.sum(dtype=torch.float64))
        self._tokens += len(scores.logprob_P)

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
        return PerplexityResult(
            of=self._of,
            text=text.name,
            window=text.window,
            bos=text.bos,
            tokens=self._tokens,
            text_tokens=text.text_tokens,
            perplexity=math.exp(mean),
            bits_per_byte=self._nats / math.log(2) / text.predicted_bytes,
            from_cache=self._from_cache,
        )


class AgainstDense:
    """KL, loss, and which tokens are held most likely, against the dense model's scores of the same windows.

    The scores that are added must have looked at the tokens that the dense ones looked at.
    """

    def __init__(self, text: EvaluationText, dense: Sequence[WindowScores]) -> None:
        self._text, self._dense = text, dense
        self._top_mass: list[Tensor] = []
        self._kl: list[Tensor] = []
        self._loss_increase: list[Tensor] = []
        self._same_top: list[Tensor] = []
        self._right_to_wrong: list[Tensor] = []
        self._wrong_to_right: list[Tensor] = []

    def add(self, scores: WindowScores) -> None:
        """Add a window's token-by-token comparison."""
        dense = self._dense[scores.window]
        assert torch.equal(dense.targets_P, scores.targets_P), "scores of other windows"
        right_P, right_before_P = scores.best_P == scores.targets_P, dense.best_P == dense.targets_P
        self._top_mass.append(dense.logprobs_PK.double().exp().sum(-1))
        self._kl.append(divergences(dense.logprobs_PK, scores.logprobs_PK))
        self._loss_increase.append(dense.logprob_P.double() - scores.logprob_P.double())
        self._same_top.append(scores.best_P == dense.best_P)
        self._right_to_wrong.append(right_before_P & ~right_P)
        self._wrong_to_right.append(right_P & ~right_before_P)

    def result(self) -> Divergence:
        """Quantiles are observed values."""
        text, kl_N = self._text, torch.cat(self._kl).sort().values
        median, ninety, ninety_nine = (float(kl_N[math.ceil(share * len(kl_N)) - 1]) for share in (0.5, 0.9, 0.99))
        return Divergence(
            text=text.name,
            window=text.window,
            bos=text.bos,
            tokens=len(kl_N),
            top=self._dense[0].logprobs_PK.shape[-1],
            top_mass=estimate(self._top_mass).mean,
            kl=estimate(self._kl),
            kl_median=median,
            kl_90=ninety,
            kl_99=ninety_nine,
            loss_increase=estimate(self._loss_increase),
            same_top=estimate(self._same_top),
            right_to_wrong=estimate(self._right_to_wrong),
            wrong_to_right=estimate(self._wrong_to_right),
        )


def feed(scores: Iterable[WindowScores], *reductions: Reduction) -> None:
    """Add every window's scores to all of them, in one pass."""
    for window in scores:
        for reduction in reductions:
            reduction.add(window)


def divergences(dense_PK: Tensor, other_PK: Tensor) -> Tensor:
    """KL(dense ‖ other) of every token in nats, float64, from log-probabilities of the same K tokens.

    All further tokens count as one, whose probability is what the K leave over.
    """
    p_PK, q_PK = dense_PK.double().exp(), other_PK.double().exp()
    tail_P, other_tail_P = ((1 - each.sum(-1)).clamp(min=LEAST_TAIL) for each in (p_PK, q_PK))
    seen_P = (p_PK * (dense_PK.double() - other_PK.double())).sum(-1)
    return (seen_P + tail_P * (tail_P.log() - other_tail_P.log())).clamp(min=0)


def estimate(windows: Sequence[Tensor]) -> Estimate:
    """Mean over all tokens of some windows, and its standard error with windows as the unit that varies.

    sqrt(M / (M - 1) · Σ_w (s_w - n_w · mean)²) ÷ Σ_w n_w for M windows with n_w tokens of sum s_w: the linearised error
    of a ratio of sums. Windows of one text are taken as independent; tokens inside of one are not.

    Source: Cochran, Sampling Techniques, 3rd edition, section 6.3 (ratio estimates), for clusters of unequal size.
    """
    sums_M = torch.stack([window.sum(dtype=torch.float64) for window in windows])
    counts_M = torch.tensor([len(window) for window in windows], dtype=torch.float64)
    total, count = counts_M.sum(), len(windows)
    mean = float(sums_M.sum() / total)
    if count < 2:
        return Estimate(mean=mean, standard_error=None)
    spread = (sums_M - counts_M * mean).square().sum() * count / (count - 1)
    return Estimate(mean=mean, standard_error=float(spread.sqrt() / total))
