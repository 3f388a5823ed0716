"""The possible ranks of a matrix, and the loss of each. O = outputs, I = inputs, K = min(O, I)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmcompress.numerics.low_rank import break_even


class Option(NamedTuple):
    """A rank that a matrix can have, its parameters, and what is lost with it."""

    rank: int
    parameters: int
    loss: float


@dataclass(frozen=True)
class Matrix:
    """A matrix to be factored: `gain_K` is what each further direction is worth, in order; ranks in whole steps."""

    outputs: int
    inputs: int
    gain_K: Tensor
    step: int = 1

    def options(self) -> list[Option]:
        """From one step of rank up to the last that saves parameters; then the matrix itself, which loses nothing."""
        total = float(self.gain_K.double().sum())
        lost = (total - self.gain_K.double().cumsum(0)).clamp_min(0).tolist()
        both = self.outputs + self.inputs
        ranks = range(self.step, break_even(self.outputs, self.inputs), self.step)
        dense = Option(min(self.outputs, self.inputs), self.outputs * self.inputs, 0.0)
        return [*(Option(rank, rank * both, lost[rank - 1]) for rank in ranks), dense]


def uniform_rank(outputs: int, inputs: int, keep: float, step: int) -> int:
    """The rank at which the factors have that fraction of the matrix's parameters, in whole steps, at least one."""
    rank = int(keep * outputs * inputs / (outputs + inputs) + 1e-9)
    return min(max(step, rank // step * step), min(outputs, inputs))


def equal_shares(gain_K: Tensor) -> Tensor:
    """Gains as shares of their sum, so that large matrices do not count for more; all zero where nothing was seen."""
    total = gain_K.double().sum()
    return gain_K.double() / total if total > 0 else torch.zeros_like(gain_K, dtype=torch.float64)
