"""One update of RigL's connections: the weakest are dropped, and as many grow where the gradient is largest."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.numerics.masks import lowest


def drop_and_grow(weight: Tensor, gradient: Tensor, active: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The new set of active weights, which were dropped and which grew; never more than there are idle ones.

    Source: Evci et al., arXiv 1911.11134, Algorithm 1. Differs: what was just dropped does not grow back at once, so
    exactly `count` connections are new.
    """
    count = min(count, int((~active).sum()), int(active.sum()))
    dropped = lowest(weight.abs().masked_fill(~active, torch.inf), count)
    grown = lowest((-gradient.abs()).masked_fill(active, torch.inf), count)
    return (active & ~dropped) | grown, dropped, grown
