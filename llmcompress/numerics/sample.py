"""Evenly spaced tokens of a site's input, for what needs individual values. T = tokens, I = inputs, K = kept."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.numerics.statistics import Statistic


class InputSample(Statistic):
    """At most `LIMIT` tokens, evenly spaced over all that came: quantiles of magnitudes, for instance.

    Every `stride`-th token is kept; when there are too many, every other one is dropped and the stride doubles.
    """

    LIMIT: ClassVar[int] = 2048

    adds_up: ClassVar[bool] = False

    def __init__(self, inputs: int, device: torch.device) -> None:
        super().__init__(inputs, device)
        self.rows_KI = torch.zeros(0, inputs, dtype=torch.float32, device=device)
        self._stride = 1

    @override
    def add(self, x_TI: Tensor) -> None:
        first = -self.tokens % self._stride
        self.tokens += len(x_TI)
        self.rows_KI = torch.cat([self.rows_KI, x_TI[first :: self._stride]])
        while len(self.rows_KI) > self.LIMIT:
            self.rows_KI = self.rows_KI[::2].clone()
            self._stride *= 2

    @override
    def rescale(self, divide_I: Tensor) -> None:
        self.rows_KI.div_(divide_I)

    @override
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.rows_KI).all())

    def magnitude_below(self, share: float) -> float:
        """That quantile of the magnitudes; 0 for the quantile 0, or without tokens."""
        magnitudes_N = self.rows_KI.abs().flatten()
        rank = int(share * len(magnitudes_N))
        return float(magnitudes_N.kthvalue(rank).values) if rank else 0.0
