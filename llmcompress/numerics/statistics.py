"""What passes want to know about a site's input, accumulated batch by batch. T = tokens, I = inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override


class Statistic(ABC):
    """Something accumulated from a site's input; one per group of sites that share it."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.tokens = 0

    @abstractmethod
    def add(self, x_TI: Tensor) -> None:
        """Take in more tokens; `x_TI` is float32."""

    @abstractmethod
    def rescale(self, divide_I: Tensor) -> None:
        """Become the statistic of the input divided channel by channel, as a fold leaves it."""

    @abstractmethod
    def is_finite(self) -> bool:
        """Whether no NaN or Inf was seen."""


class Gram(Statistic):
    """Sum over tokens of x xᵀ: all that any squared error of a linear's output depends on."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        super().__init__(inputs, device)
        self.sum_II = torch.zeros(inputs, inputs, dtype=torch.float32, device=device)

    @override
    def add(self, x_TI: Tensor) -> None:
        self.tokens += len(x_TI)
        self.sum_II.addmm_(x_TI.T, x_TI)

    @override
    def rescale(self, divide_I: Tensor) -> None:
        self.sum_II.div_(divide_I).div_(divide_I[:, None])

    @override
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.sum_II.diagonal()).all())


class AbsMax(Statistic):
    """Largest magnitude of every channel: SmoothQuant's scale and the range of static activations."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        super().__init__(inputs, device)
        self.max_I = torch.zeros(inputs, dtype=torch.float32, device=device)

    @override
    def add(self, x_TI: Tensor) -> None:
        self.tokens += len(x_TI)
        if len(x_TI):
            torch.maximum(self.max_I, x_TI.abs().amax(0), out=self.max_I)

    @override
    def rescale(self, divide_I: Tensor) -> None:
        self.max_I.div_(divide_I)

    @override
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.max_I).all())


class AbsMean(Statistic):
    """Mean magnitude of every channel: AWQ's measure of salience."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        super().__init__(inputs, device)
        self.sum_I = torch.zeros(inputs, dtype=torch.float32, device=device)

    @override
    def add(self, x_TI: Tensor) -> None:
        self.tokens += len(x_TI)
        self.sum_I += x_TI.abs().sum(0)

    @override
    def rescale(self, divide_I: Tensor) -> None:
        self.sum_I.div_(divide_I)

    @override
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.sum_I).all())

    @property
    def mean_I(self) -> Tensor:
        """Zeros when no token was seen."""
        return self.sum_I / max(self.tokens, 1)
