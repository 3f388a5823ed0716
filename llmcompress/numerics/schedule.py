"""How sparse a network is after each round of pruning, and how many connections RigL moves at each step."""

from __future__ import annotations

import math


def exponential_shares(share: float, rounds: int) -> list[float]:
    """Shares dropped after rounds 1 … n: what is kept shrinks by the same factor every round.

    Source: Tanaka et al., arXiv 2006.05467, section 6 (SynFlow's schedule).
    """
    return [1 - (1 - share) ** (index / rounds) for index in range(1, rounds + 1)]


def moved_share(step: int, *, alpha: float, end: float) -> float:
    """f(t) = α/2 (1 + cos(π t / T_end)): the share of a layer's connections that are replaced at step t.

    Source: Evci et al., arXiv 1911.11134, section 3.
    """
    return alpha / 2 * (1 + math.cos(math.pi * min(step / end, 1.0)))
