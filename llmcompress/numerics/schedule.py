"""Sparsity schedules: the sparsity after each pruning round and of each layer, and RigL's update fraction."""

from __future__ import annotations

import math
from collections.abc import Sequence


def exponential_shares(share: float, rounds: int) -> list[float]:
    """Shares dropped after rounds 1 … n: what is kept shrinks by the same factor every round.

    Source: Tanaka et al., arXiv 2006.05467, section 6 (SynFlow's schedule).
    """
    return [1 - (1 - share) ** (index / rounds) for index in range(1, rounds + 1)]


def moved_share(step: int, *, alpha: float, end: float) -> float:
    """f(t) = α/2 (1 + cos(π t / T_end)): the fraction of a layer's connections that are replaced at step t.

    Source: Evci et al., arXiv 1911.11134, section 3.
    """
    return alpha / 2 * (1 + math.cos(math.pi * min(step / end, 1.0)))


def erk_shares(shapes: Sequence[tuple[int, int]], share: float) -> list[float]:
    """Shares to drop so that a layer's density goes with (outputs + inputs) ÷ (outputs · inputs), their mean as asked.

    Layers that this would make denser than dense stay dense.

    Source: Mocanu et al., arXiv 1707.04780; Evci et al., arXiv 1911.11134, section 3 (Erdős–Rényi).
    """
    sizes = [outputs * inputs for outputs, inputs in shapes]
    raw = [(outputs + inputs) / size for (outputs, inputs), size in zip(shapes, sizes, strict=True)]
    dense: set[int] = set()
    while True:
        rest = [index for index in range(len(shapes)) if index not in dense]
        left = (1 - share) * sum(sizes) - sum(sizes[index] for index in dense)
        scale = left / max(sum(raw[index] * sizes[index] for index in rest), 1e-30)
        full = {index for index in rest if scale * raw[index] > 1}
        if not full:
            return [0.0 if index in dense else max(0.0, 1 - scale * raw[index]) for index in range(len(shapes))]
        dense |= full
