"""Saliency scores of weights for training, and exact global or layer-wise masks from any score.

A mask is True where a weight is pruned; higher scores are kept. Scores may have any sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from llmcompress.numerics.masks import count_of_zeros, lowest, lowest_counts

Comparison = Literal["layer", "global"]


def connection_sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w g|: how fast the loss moves when the connection is turned down.

    Source: Lee et al., arXiv 1810.02340, eq. 4. Differs: not divided by the sum of all scores, which changes no order.
    """
    return (weight * gradient).abs()


def kept_gradient_flow(weight: Tensor, hessian_gradient: Tensor) -> Tensor:
    """w (H g): how much of the squared length of the gradient goes when the weight does, to first order.

    Source: Wang et al., arXiv 2002.07376, eq. 8 and Algorithm 2; their score is the negative, its highest removed.
    """
    return weight * hessian_gradient


def drop_lowest(
    scores: Sequence[Tensor], zeros: Sequence[Tensor], share: float, comparison: Comparison
) -> list[Tensor]:
    """Masks with exactly this sparsity: in each tensor, or over all of them.

    `zeros` are True where a weight is zero already: those are dropped before all others, and count.
    """
    scores = [score.float().masked_fill(zero, -torch.inf) for score, zero in zip(scores, zeros, strict=True)]
    if comparison == "layer":
        counts = [count_of_zeros(share, score.numel()) for score in scores]
    else:
        total = count_of_zeros(share, sum(score.numel() for score in scores))
        counts = lowest_counts(lambda: map(_ordered, scores), total)
    return [lowest(score, count) for score, count in zip(scores, counts, strict=True)]


def _ordered(score: Tensor) -> Tensor:
    """Numbers whose bits, as integers, stand in the order of the scores; neighbouring floats may fall together.

    `lowest_counts` looks at the bits alone, which order non-negative floats only.
    """
    bits = score.contiguous().view(torch.int32)
    signed = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ((signed >> 1) + (1 << 30)).view(torch.float32)


def hamming_distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Share of all weights on which two sets of masks differ."""
    differing = sum(int((a != b).sum()) for a, b in zip(one, other, strict=True))
    return differing / max(1, sum(mask.numel() for mask in one))
