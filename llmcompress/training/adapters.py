"""Low-rank adapters (LoRA): merged into dense weights, or kept as branches on quantized ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from llmcompress.model.site import LinearSite
from llmcompress.modules.corrected import CorrectedLinear
from llmcompress.modules.low_rank import linear_of


class MaskedAdapter(nn.Module):
    """weight + scale · (left @ right), but only where the weight is not zero. `left` begins at zero.

    Source: Hu et al., arXiv 2106.09685. Differs: the product is masked, because a dense one would undo pruning.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        rows, columns = weight.shape
        left, right = _factors(rows, columns, rank, like=weight)
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)
        self.scale = scale
        self.alive = weight.detach() != 0

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the model computes with."""
        return weight + self.scale * (self.left @ self.right) * self.alive


class MaskedDoRA(MaskedAdapter):
    """The sum of `MaskedAdapter` with rows of a learned length: the adapter changes directions alone. Zeros stay zero.

    Source: Liu et al., arXiv 2402.09353 (DoRA), equation 5 and section 4.3 (no gradient through the lengths of the
    sum). Differs: masked, as above.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, *, transposed: bool) -> None:
        super().__init__(weight, rank, scale)
        self._inputs = 0 if transposed else 1
        self.length = nn.Parameter(self._lengths(weight.detach()))

    @override
    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the model computes with; before the first step the very weight."""
        sum_ = super().forward(weight)
        return sum_ * (self.length / self._lengths(sum_.detach()))

    def _lengths(self, weight: Tensor) -> Tensor:
        """Of the rows of outputs; 1 for a row of zeros."""
        lengths = weight.norm(dim=self._inputs, keepdim=True)
        return torch.where(lengths > 0, lengths, 1.0)


class _Scaled(nn.Module):
    """A parametrization: the left factor of a branch, times the scale of adapters."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, left_OR: Tensor) -> Tensor:
        return self.scale * left_OR


@contextmanager
def adapted(
    sites: Sequence[LinearSite], *, rank: int, scale: float, seed: int, dora: bool = False
) -> Iterator[list[nn.Parameter]]:
    """Adds adapters to every site and yields their parameters for training.

    A linear has its adapter as a branch, whose gradient needs none of the whole weight; where a mask must hold, for
    DoRA, and in a `Conv1D`, the adapter is part of the weight. At the end of the context adapters on ordinary linears
    are merged into the weight; those of a quantized (or otherwise compressed) linear stay, in a `CorrectedLinear`
    around it. After an exception everything is restored. `dora`: lengths of rows are trained too, on ordinary linears.
    """
    before = {site: site.module for site in sites}
    branches: dict[LinearSite, CorrectedLinear] = {}
    stays: set[LinearSite] = {site for site in sites if site.is_compressed}
    trained: list[nn.Parameter] = []
    changed: list[nn.Module] = []
    merge = False
    try:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            for site, module in before.items():
                if site in stays or not (dora or site.is_pruned or site.info.transposed):
                    branch = branches[site] = _branch(site, module, rank)
                    site.replace(branch)
                    trained += [branch.left.get_parameter("weight"), branch.right.get_parameter("weight")]
                    changed.append(branch.left)
                    parametrize.register_parametrization(branch.left, "weight", _Scaled(scale))
                else:
                    adapter = _adapter(site, module.get_parameter("weight"), rank, scale, dora=dora)
                    trained += adapter.parameters()
                    changed.append(module)
                    parametrize.register_parametrization(module, "weight", adapter)
        yield trained
        merge = True
    finally:
        for module in changed:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=merge)
        for site, branch in branches.items():
            if merge and site in stays:
                continue
            site.replace(before[site])
            if merge:
                site.write(site.weight_OI + branch.left.get_parameter("weight") @ branch.right.get_parameter("weight"))


def _adapter(site: LinearSite, weight: Tensor, rank: int, scale: float, *, dora: bool) -> MaskedAdapter:
    if dora:
        return MaskedDoRA(weight, rank, scale, transposed=site.info.transposed)
    return MaskedAdapter(weight, rank, scale)


def _branch(site: LinearSite, base: nn.Module, rank: int) -> CorrectedLinear:
    """The module with a branch that adds zero."""
    like = next(tensor for tensor in (*base.parameters(), *base.buffers()))
    left_OR, right_RI = _factors(site.info.outputs, site.info.inputs, rank, like=like.new_empty(0, dtype=torch.float32))
    return CorrectedLinear(base, linear_of(right_RI, None), linear_of(left_OR, None)).train(base.training)


def _factors(rows: int, columns: int, rank: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros, and small random numbers: their product is zero and has a gradient."""
    rank = min(rank, rows, columns)
    return like.new_zeros(rows, rank), torch.randn(rank, columns).to(like) / math.sqrt(columns)
