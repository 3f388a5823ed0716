"""SynFlow on a residual network: how much of a flow of ones through |W| passes each weight, without data.

D = hidden size, C = columns of a consumer, O = outputs, I = inputs, U = units. All in the dtype of the weights, which
should be float64: scores of one network differ by many orders of magnitude.

The network is what remains of a decoder if only products with weights are kept:

* biases and activation functions are removed, norms divide by a constant;
* a gate multiplies (SwiGLU), and the queries and keys of a head multiply the head's values: attention mixes nothing
  (every token is alike), but its weights are part of the path;
* gates and attention are scaled to a mean of 1 over their units, which is a constant as well.

The total flow R is therefore linear in the weights of any one linear, and by Euler's theorem the scores |w| ∂R/∂|w| of
the linears of one branch have the same sum. In a chain this sum is the same everywhere, so no layer ever becomes empty.
Here the residual stream bypasses every branch, and weak branches could become empty: each branch's scores are therefore
divided by the flow through it, which restores the law of the chain.

Source: Tanaka et al., arXiv 2006.05467. Differs: their networks have neither attention, gates nor norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """Rows of a linear that multiply what a unit lets through; rows of unit -1 do not."""

    site: str
    unit_of_O: Tensor


@dataclass(frozen=True)
class Branch:
    """From the residual stream to one consumer: `source` rows come through, multiplied unit by unit."""

    source: str | None
    """The linear whose rows the consumer's columns see; None: ones."""
    row_of_C: Tensor
    unit_of_C: Tensor
    units: int
    factors: tuple[Factor, ...]
    consumer: str | None
    """Writes to the residual stream; what it writes counts by itself where that has another width, and what comes
    through where there is no consumer."""


Stage = tuple[Branch, ...]
"""Branches that read the same hidden state, and whose outputs are added to it."""


def through_block(hidden_D: Tensor, stages: Sequence[Stage], weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The hidden state after a block, and the flow that ended inside it. `weights` are the |W|, O×I."""
    ended = hidden_D.new_zeros(())
    for stage in stages:
        normed_D = hidden_D / hidden_D.detach().square().mean().sqrt().clamp_min(torch.finfo(hidden_D.dtype).tiny)
        for branch in stage:
            flow = _through(normed_D, branch, weights)
            if branch.consumer is not None:
                flow = weights[branch.consumer] @ flow
            if branch.consumer is None or flow.shape != hidden_D.shape:
                ended = ended + flow.sum()
            else:
                hidden_D = hidden_D + flow
    return hidden_D, ended


def _through(normed_D: Tensor, branch: Branch, weights: Mapping[str, Tensor]) -> Tensor:
    """What a consumer's columns see."""
    if branch.source is None:
        seen_C = torch.ones_like(branch.row_of_C, dtype=normed_D.dtype)
    else:
        seen_C = _read(weights[branch.source], normed_D)[branch.row_of_C]
    for factor in branch.factors:
        rows_O = _read(weights[factor.site], normed_D)
        place_O = torch.where(factor.unit_of_O < 0, branch.units, factor.unit_of_O)
        sum_U = rows_O.new_zeros(branch.units + 1).index_add(0, place_O, rows_O)[: branch.units]
        mean = sum_U.detach().mean()
        if mean > 0:
            sum_U = sum_U / mean
        ones = sum_U.new_ones(1)
        seen_C = seen_C * torch.cat([sum_U, ones])[torch.where(branch.unit_of_C < 0, branch.units, branch.unit_of_C)]
    return seen_C


def _read(weight_OI: Tensor, normed_D: Tensor) -> Tensor:
    """A linear that does not read the residual stream (another width) sees ones."""
    same = weight_OI.shape[1] == len(normed_D)
    return weight_OI @ normed_D if same else weight_OI.sum(1)


def synflow_scores(
    hidden_size: int, blocks: Sequence[Sequence[Stage]], weights: Sequence[Mapping[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """|w| ∂R/∂|w| of every weight of every block, by name, divided by the flow through its branch.

    R is the sum of the last hidden state and of flows that ended. Only one block's graph exists at a time: the hidden
    states between blocks are single vectors.
    """
    some = next(iter(weights[0].values()))
    hidden_D = some.new_ones(hidden_size)
    entries = []
    for stages, block_weights in zip(blocks, weights, strict=True):
        entries.append(hidden_D)
        with torch.no_grad():
            hidden_D, _ = through_block(hidden_D, stages, {name: each.abs() for name, each in block_weights.items()})
    gradient_D = torch.ones_like(hidden_D)
    scores: list[dict[str, Tensor]] = []
    for entry_D, stages, block_weights in zip(reversed(entries), reversed(blocks), reversed(weights), strict=True):
        entry_D = entry_D.requires_grad_()
        sizes = {name: each.abs().requires_grad_() for name, each in block_weights.items()}
        with torch.enable_grad():
            leaving_D, ended = through_block(entry_D, stages, sizes)
            total = leaving_D @ gradient_D + ended
            found = torch.autograd.grad(total, [entry_D, *sizes.values()], allow_unused=True)
        assert found[0] is not None
        gradient_D = found[0]
        products = {
            name: torch.zeros_like(size) if each is None else (size * each).detach()
            for (name, size), each in zip(sizes.items(), found[1:], strict=True)
        }
        scores.append(_per_branch(products, stages))
    return scores[::-1]


def _per_branch(products: dict[str, Tensor], stages: Sequence[Stage]) -> dict[str, Tensor]:
    """Divided by the flow through the branches that a linear is part of."""
    flows: dict[str, Tensor] = {}
    for branch in (branch for stage in stages for branch in stage):
        members = [branch.source, branch.consumer, *(factor.site for factor in branch.factors)]
        names = {name for name in members if name is not None}
        last = branch.consumer or branch.source
        assert last is not None
        for name in names:
            flows[name] = flows.get(name, 0.0) + products[last].sum()
    return {name: each / flows[name] if flows[name] > 0 else each for name, each in products.items()}
