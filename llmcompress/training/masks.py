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
        with torch.no_grad():
            pruned = [(each, each == 0) for each in parameters if each.dim() > 1]
        self._pruned = [(parameter, zero) for parameter, zero in pruned if bool(zero.any())]

    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Drop the gradients of zeros."""
        for parameter, zero in self._pruned:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(zero, 0)

    @torch.no_grad()
    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """They cannot have changed; this also turns negative zeros into positive ones."""
        for parameter, zero in self._pruned:
            parameter.masked_fill_(zero, 0)

    def state(self) -> dict[str, Tensor]:
        """Nothing: the zeros are in the initial weights."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""
