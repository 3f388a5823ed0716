"""Masks in training: exact zeros stay zero, unless a pass has its own masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Masks(Protocol):
    """Called around every optimizer step."""

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Gradients of step `step` (1, 2, …) are complete, of pruned weights too; they are not clipped yet."""

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """The weights have changed."""

    def state(self) -> dict[str, Tensor]:
        """State for resuming, besides the weights."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""


class ZerosStay:
    """Every exact zero of a matrix stays one: its gradient is dropped, so it enters no norm and no optimizer state.

    Vectors are free: a bias that begins at zero is no pruned bias. A pass whose new matrices begin at zero leaves
    them out of `parameters`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        found = ((each, _zeros_of(each)) for each in parameters if each.dim() > 1)
        self._pruned = [(parameter, zeros) for parameter, zeros in found if zeros is not None]

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Drop the gradients of zeros."""
        for parameter, zeros in self._pruned:
            if parameter.grad is not None:
                _clear(parameter.grad, zeros)

    @torch.no_grad()
    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """They cannot have changed; this also turns negative zeros into positive ones."""
        for parameter, zeros in self._pruned:
            _clear(parameter, zeros)

    def state(self) -> dict[str, Tensor]:
        """Nothing: the zeros are in the initial weights."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""


Zeros = Tensor | tuple[Tensor, ...]
"""A mask, or the places of few zeros: a dense checkpoint has some in every matrix, and a mask is a quarter as large as
the matrix."""


@torch.no_grad()
def _zeros_of(parameter: nn.Parameter) -> Zeros | None:
    """None: there are none."""
    mask = parameter == 0
    if not bool(mask.any()):
        return None
    if type(mask) is not Tensor:  # in shards
        return mask
    places = mask.nonzero(as_tuple=True)
    return places if sum(each.nbytes for each in places) < mask.nbytes else mask


def _clear(tensor: Tensor, zeros: Zeros) -> None:
    if isinstance(zeros, Tensor):
        tensor.masked_fill_(zeros, 0)
    else:
        tensor.index_put_(zeros, tensor.new_zeros(()))
