"""Low-rank adapters that can be merged without a trace: what they add to a zero is zero, during training already."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class MaskedAdapter(nn.Module):
    """weight + scale · (left @ right), but only where the weight is not zero. `left` begins at zero.

    Source: Hu et al., arXiv 2106.09685. Differs: the product is masked, because a dense one would undo pruning.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        rows, columns = weight.shape
        rank = min(rank, rows, columns)
        self.left = nn.Parameter(weight.new_zeros(rows, rank))
        self.right = nn.Parameter(torch.randn(rank, columns).to(weight) / math.sqrt(columns))
        self.scale = scale
        self.alive = weight.detach() != 0

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the model computes with."""
        return weight + self.scale * (self.left @ self.right) * self.alive


@contextmanager
def adapted(modules: Sequence[nn.Module], *, rank: int, scale: float, seed: int) -> Iterator[list[nn.Parameter]]:
    """Adapters on the `weight` of every module; their parameters, to be trained. Merged when the context ends."""
    adapters = []
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for module in modules:
            adapter = MaskedAdapter(module.get_parameter("weight"), rank, scale)
            adapters.append(adapter)
            parametrize.register_parametrization(module, "weight", adapter)
    try:
        yield [each for adapter in adapters for each in (adapter.left, adapter.right)]
    finally:
        for module in modules:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
