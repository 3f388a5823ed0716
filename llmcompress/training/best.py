"""The trained weights that validation liked best so far, for a training that diverges later."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class BestWeights:
    """A copy on the CPU of the parameters with the lowest validation loss, and when that was."""

    def __init__(self) -> None:
        self.step, self.loss = 0, math.inf
        self._weights: list[Tensor] = []

    @torch.no_grad()
    def consider(self, step: int, loss: float, parameters: Sequence[nn.Parameter]) -> None:
        """Keep them if they are better than all before."""
        if loss < self.loss:
            self.step, self.loss = step, loss
            self._weights = [each.detach().to("cpu", copy=True) for each in parameters]

    @torch.no_grad()
    def put_back(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Give the parameters these values; returns whether there are any."""
        for parameter, weight in zip(parameters, self._weights, strict=False):
            parameter.copy_(weight)
        return bool(self._weights)

    def state(self) -> dict[str, Tensor]:
        """For resuming."""
        about = torch.tensor([float(self.step), self.loss], dtype=torch.float64)
        return {"about": about, **{f"weight.{index}": each for index, each in enumerate(self._weights)}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """What `state` returned."""
        step, loss = state["about"].tolist()
        self.step, self.loss = int(step), loss
        self._weights = [state[f"weight.{index}"] for index in range(len(state) - 1)]
