"""KL by position, and the tokens in their context at which the compressed model departs most from the dense one.

P = predictions of a window that count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmcompress.evaluation.divergence import divergences
from llmcompress.evaluation.scores import WindowScores
from llmcompress.evaluation.texts import EvaluationText
from llmcompress.records.inside import MovedToken, PositionDivergence, TokenDivergences

SHOWN = 20
"""Tokens that are told."""

CONTEXT, AFTER = 24, 8
"""Tokens before and after each."""

BINS = 32
"""Groups of positions, at most."""


def moved_tokens(
    text: EvaluationText,
    dense: Sequence[WindowScores],
    found: Sequence[WindowScores],
    decode: Callable[[list[int]], str],
) -> TokenDivergences:
    """From the scores of the same windows; `decode`: token ids → text."""
    kl = [divergences(before.logprobs_PK, after.logprobs_PK) for before, after in zip(dense, found, strict=True)]
    kl_N = torch.cat(kl)
    ends = torch.tensor([len(each) for each in kl]).cumsum(0)
    worst = []
    for number in kl_N.topk(min(SHOWN, len(kl_N))).indices.tolist():
        index = int((ends <= number).sum())
        place = number - int(ends[index]) + len(kl[index])
        worst.append(_token(text, (dense[index], found[index]), place, float(kl_N[number]), decode))
    return TokenDivergences(
        text=text.name, protocol=text.protocol, positions=tuple(_by_position(kl, text.skips)), worst=tuple(worst)
    )


def _by_position(kl: Sequence[Tensor], skips: Sequence[int]) -> list[PositionDivergence]:
    """Means over all windows that predict at a position, in groups of equally many positions."""
    positions_N = torch.cat([torch.arange(len(each)) + skip for each, skip in zip(kl, skips, strict=True)])
    first, last = int(positions_N.min()), int(positions_N.max())
    step = -(-(last - first + 1) // BINS)
    bins_N = (positions_N - first) // step
    counts = torch.bincount(bins_N)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, bins_N, torch.cat(list(kl)))
    return [
        PositionDivergence(
            first=first + step * number,
            last=min(first + step * (number + 1) - 1, last),
            kl=float(sums[number] / counts[number]),
        )
        for number in range(len(counts))
        if counts[number]
    ]


def _token(
    text: EvaluationText,
    pair: tuple[WindowScores, WindowScores],
    place: int,
    kl: float,
    decode: Callable[[list[int]], str],
) -> MovedToken:
    dense, found = pair
    window = text.windows[found.window].tolist()
    position = place + text.skips[found.window] + 1
    return MovedToken(
        before=decode(window[max(0, position - CONTEXT) : position]),
        actual=decode([window[position]]),
        after=decode(window[position + 1 : position + 1 + AFTER]),
        dense=decode([int(dense.best_P[place])]),
        compressed=decode([int(found.best_P[place])]),
        kl=kl,
        dense_probability=_probability(dense.logprob_P[place]),
        compressed_probability=_probability(found.logprob_P[place]),
        dense_best_probability=_probability(dense.best_logprob_P[place]),
        compressed_best_probability=_probability(found.best_logprob_P[place]),
    )


def _probability(logprob: Tensor) -> float:
    return float(logprob.double().exp())
