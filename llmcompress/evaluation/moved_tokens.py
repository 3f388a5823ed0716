"""KL by position, and the tokens in their context at which the compressed model departs most from the dense one.

P = predicted tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmcompress.evaluation.reductions import divergences
from llmcompress.evaluation.scores import WindowScores
from llmcompress.records.inside import MovedToken, PositionDivergence, TokenDivergences

SHOWN = 12
"""Tokens that are told."""

CONTEXT = 24
"""Tokens before each."""

BINS = 32
"""Groups of positions, at most."""


def moved_tokens(
    name: str,
    windows: Sequence[Tensor],
    dense: Sequence[WindowScores],
    found: Sequence[WindowScores],
    decode: Callable[[list[int]], str],
) -> TokenDivergences:
    """From the scores of the same windows; `decode`: token ids → text."""
    kl = [divergences(before.logprobs_PK, after.logprobs_PK) for before, after in zip(dense, found, strict=True)]
    places = [(int(each.argmax()), index) for index, each in enumerate(kl)]
    worst = sorted(places, key=lambda place: -float(kl[place[1]][place[0]]))[:SHOWN]
    return TokenDivergences(
        text=name,
        positions=tuple(_by_position(kl)),
        worst=tuple(
            _token(windows[index], dense[index], found[index], position, float(kl[index][position]), decode)
            for position, index in worst
        ),
    )


def _by_position(kl: Sequence[Tensor]) -> list[PositionDivergence]:
    """Means over all windows that reach a position, in groups of equally many positions."""
    longest = max(len(each) for each in kl)
    sums_P, counts_P = torch.zeros(longest, dtype=torch.float64), torch.zeros(longest, dtype=torch.float64)
    for each in kl:
        sums_P[: len(each)] += each
        counts_P[: len(each)] += 1
    step = -(-longest // BINS)
    return [
        PositionDivergence(
            first=first,
            last=min(first + step, longest) - 1,
            kl=float(sums_P[first : first + step].sum() / counts_P[first : first + step].sum()),
        )
        for first in range(0, longest, step)
    ]


def _token(
    window_W: Tensor,
    dense: WindowScores,
    found: WindowScores,
    position: int,
    kl: float,
    decode: Callable[[list[int]], str],
) -> MovedToken:
    read = window_W[max(0, position + 1 - CONTEXT) : position + 1].tolist()
    return MovedToken(
        before=decode(read),
        actual=decode([int(dense.targets_P[position])]),
        dense=decode([int(dense.best_P[position])]),
        compressed=decode([int(found.best_P[position])]),
        kl=kl,
        dense_probability=float(dense.logprob_P[position].exp()),
        compressed_probability=float(found.logprob_P[position].exp()),
    )
