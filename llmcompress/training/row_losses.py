"""Losses of rows of logits, whose gradients are taken as soon as they are computed. R = rows, V = vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

RowLoss = Callable[[Tensor, slice], Tensor]
"""Logits of some rows, and which rows they are → a loss for each."""

_BYTES = 2**24
"""Of the logits that a CPU works on at once: what is computed of them stays in its cache, and in memory that is used
again for the next ones."""


def row_losses(logits_RV: Tensor, loss_of: RowLoss) -> Tensor:
    """`loss_of` all rows, a few at a time.

    A row's loss depends on that row alone. So its gradient can be taken at once, up to the factor that the backward
    pass brings: of all that lies between logits and loss, several times as large as the logits, only that gradient is
    kept. `loss_of` must depend on nothing else that is trained.
    """
    if not (torch.is_grad_enabled() and logits_RV.requires_grad):
        return torch.cat([loss_of(logits_RV[rows], rows) for rows in _parts(logits_RV)])
    losses_R: Tensor = _RowLosses.apply(logits_RV, loss_of)  # type: ignore[no-untyped-call]
    return losses_R


def _parts(logits_RV: Tensor) -> Iterator[slice]:
    count, vocabulary = logits_RV.shape
    at_once = max(1, _BYTES // (4 * vocabulary)) if logits_RV.device.type == "cpu" else count
    # without any row, one part without any: what it gives has the right shape and a gradient
    return (slice(first, min(first + at_once, count)) for first in range(0, max(count, 1), max(at_once, 1)))


class _RowLosses(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, logits_RV: Tensor, loss_of: RowLoss) -> Tensor:
        slope_RV = torch.empty_like(logits_RV)
        losses = []
        # inside a checkpoint its hooks would take what this little graph saves, and compute all of it once more
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
            for rows in _parts(logits_RV):
                some_RV = logits_RV[rows].detach().requires_grad_()
                loss_R = loss_of(some_RV, rows)
                (slope_RV[rows],) = torch.autograd.grad(loss_R.sum(), some_RV)
                losses.append(loss_R.detach())
        ctx.save_for_backward(slope_RV)
        return torch.cat(losses)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (slope_RV,) = ctx.saved_tensors
        return slope_RV * gradients[0][:, None], None


def _same(tensor: Tensor) -> Tensor:
    return tensor
