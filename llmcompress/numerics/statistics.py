"""Statistics of a site's input, accumulated batch by batch. T = tokens, I = inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.numerics.grid import stripes


class Pool(Protocol):
    """Several processes that have seen different tokens."""

    @property
    def index(self) -> int:
        """Which of them this one is."""

    def all_reduce_sum_(self, tensor: Tensor) -> None:
        """The sum over all of them, in place."""

    def all_reduce_max_(self, tensor: Tensor) -> None:
        """The elementwise maximum over all of them, in place."""


class Statistic(ABC):
    """Something accumulated from a site's input; one per group of sites that share it."""

    adds_up: ClassVar[bool] = True
    """Whether the statistics of several processes can be combined (`pool`)."""

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

    def pool(self, pool: Pool) -> None:
        """Become the statistic of the tokens that all processes have seen; not to be called unless it `adds_up`."""
        raise TypeError(f"{type(self).__name__} cannot be combined from several processes")

    def _pool_tokens(self, pool: Pool) -> None:
        tokens = torch.tensor([self.tokens], dtype=torch.int64)
        pool.all_reduce_sum_(tokens)
        self.tokens = int(tokens)


class Gram(Statistic):
    """Sum over tokens of x xᵀ: all that any squared error of a linear's output depends on."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        super().__init__(inputs, device)
        self._sum_II = torch.zeros(inputs, inputs, dtype=torch.float32, device=device)
        self._stripes = stripes(inputs)
        self._mirrored = True

    @property
    def sum_II(self) -> Tensor:
        """The whole symmetric matrix."""
        if not self._mirrored:
            for start, stop in self._stripes:
                self._sum_II[stop:, start:stop] = self._sum_II[start:stop, stop:].T
            self._mirrored = True
        return self._sum_II

    @override
    def add(self, x_TI: Tensor) -> None:
        self.tokens += len(x_TI)
        # stripes on and right of the diagonal: nearly half of the products are known from the other half
        for start, stop in self._stripes:
            self._sum_II[start:stop, start:].addmm_(x_TI[:, start:stop].T, x_TI[:, start:])
        self._mirrored = False

    @override
    def rescale(self, divide_I: Tensor) -> None:
        self._sum_II.div_(divide_I).div_(divide_I[:, None])

    @override
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self._sum_II.diagonal()).all())

    @override
    def pool(self, pool: Pool) -> None:
        self._pool_tokens(pool)
        pool.all_reduce_sum_(self._sum_II)


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

    @override
    def pool(self, pool: Pool) -> None:
        self._pool_tokens(pool)
        pool.all_reduce_max_(self.max_I)


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

    @override
    def pool(self, pool: Pool) -> None:
        self._pool_tokens(pool)
        pool.all_reduce_sum_(self.sum_I)

    @property
    def mean_I(self) -> Tensor:
        """Zeros when no token was seen."""
        return self.sum_I / max(self.tokens, 1)


class SquaredNorm(Statistic):
    """Sum of squares of every channel: Wanda's measure of salience, the diagonal of the Gram matrix."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        super().__init__(inputs, device)
        self.sum_I = torch.zeros(inputs, dtype=torch.float32, device=device)

    @override
    def add(self, x_TI: Tensor) -> None:
        self.tokens += len(x_TI)
        self.sum_I += x_TI.square().sum(0)

    @override
    def rescale(self, divide_I: Tensor) -> None:
        self.sum_I.div_(divide_I).div_(divide_I)

    @override
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.sum_I).all())

    @override
    def pool(self, pool: Pool) -> None:
        self._pool_tokens(pool)
        pool.all_reduce_sum_(self.sum_I)


class Sketch(Statistic):
    """Random ± sums of all tokens: squared output errors estimated to some ten per cent, at a share of a Gram matrix.

    With signs s the mean of (ΔW Σ sₜ xₜ)² over draws is Σ (ΔW xₜ)². Source: Alon, Matias, Szegedy, STOC 1996.
    """

    DRAWS: ClassVar[int] = 128

    def __init__(self, inputs: int, device: torch.device) -> None:
        super().__init__(inputs, device)
        self.sum_DI = torch.zeros(self.DRAWS, inputs, dtype=torch.float32, device=device)
        self._generator = torch.Generator().manual_seed(0)

    @override
    def add(self, x_TI: Tensor) -> None:
        self.tokens += len(x_TI)
        bits_DT = torch.randint(0, 2, (self.DRAWS, len(x_TI)), generator=self._generator, dtype=torch.float32)
        self.sum_DI.addmm_(bits_DT.to(x_TI.device).mul_(2).sub_(1), x_TI)

    @override
    def rescale(self, divide_I: Tensor) -> None:
        self.sum_DI.div_(divide_I)

    @override
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.sum_DI).all())

    @override
    def pool(self, pool: Pool) -> None:
        self._pool_tokens(pool)
        # all processes drew the same signs for their tokens: new ones for each process keep their sums independent
        generator = torch.Generator().manual_seed(1 + pool.index)
        signs_D1 = torch.randint(0, 2, (self.DRAWS, 1), generator=generator).mul_(2).sub_(1)
        self.sum_DI *= signs_D1.to(self.sum_DI)
        pool.all_reduce_sum_(self.sum_DI)

    def output_error(self, difference_OI: Tensor) -> float:
        """An estimate of Σ over tokens and outputs of (ΔW x)²."""
        return float((difference_OI @ self.sum_DI.T).square().sum(dtype=torch.float64)) / self.DRAWS


class Moments(Statistic):
    """Mean and variance of every channel: what FLAP asks of an input, and what a bias can take over."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        super().__init__(inputs, device)
        self.mean_I = torch.zeros(inputs, dtype=torch.float32, device=device)
        self._squares_I = torch.zeros(inputs, dtype=torch.float32, device=device)

    @override
    def add(self, x_TI: Tensor) -> None:
        count = len(x_TI)
        if not count:
            return
        # merged by Chan's formula: the plain sums of squares lose the variance of channels with a large mean
        mean_I = x_TI.mean(0)
        shift_I = mean_I - self.mean_I
        total = self.tokens + count
        self._squares_I += (x_TI - mean_I).square().sum(0) + shift_I.square() * (self.tokens * count / total)
        self.mean_I += shift_I * (count / total)
        self.tokens = total

    @override
    def rescale(self, divide_I: Tensor) -> None:
        self.mean_I.div_(divide_I)
        self._squares_I.div_(divide_I).div_(divide_I)

    @override
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self._squares_I).all() and torch.isfinite(self.mean_I).all())

    @override
    def pool(self, pool: Pool) -> None:
        tokens, mean_I = self.tokens, self.mean_I
        sum_I = mean_I * tokens
        self._pool_tokens(pool)
        pool.all_reduce_sum_(sum_I)
        self.mean_I = sum_I / max(self.tokens, 1)
        self._squares_I += (mean_I - self.mean_I).square() * tokens
        pool.all_reduce_sum_(self._squares_I)

    @property
    def variance_I(self) -> Tensor:
        """Mean squared distance from the mean; zeros when no token was seen."""
        return self._squares_I / max(self.tokens, 1)
