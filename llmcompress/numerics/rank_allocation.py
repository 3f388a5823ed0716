"""Which rank each matrix gets under one budget of parameters. O = outputs, I = inputs, K = min(O, I)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
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
    """The rank at which the factors have that share of the matrix's parameters, in whole steps, at least one."""
    rank = int(keep * outputs * inputs / (outputs + inputs) + 1e-9)
    return min(max(step, rank // step * step), min(outputs, inputs))


def allocate_ranks(matrices: Sequence[Matrix], budget: int) -> list[int]:
    """Ranks whose parameters fit the budget and which together lose least, up to the last step.

    Steps are taken in order of what they gain per parameter; where losses are not convex (a matrix that stays as it
    is loses nothing at all) several steps are taken as one. What is left goes to the best single steps that fit.

    Raises: ValueError when not even one step of rank for each fits.
    """
    options = [matrix.options() for matrix in matrices]
    chosen = [each[0] for each in options]
    left = budget - sum(option.parameters for option in chosen)
    if left < 0:
        raise ValueError(f"the least ranks need {budget - left} parameters, the budget is {budget}")
    steps = [(before, after, site) for site, each in enumerate(options) for before, after in pairwise(_hull(each))]
    for before, after, site in sorted(steps, key=lambda step: _slope(step[0], step[1]), reverse=True):
        if chosen[site] == before and after.parameters - before.parameters <= left:
            left -= after.parameters - before.parameters
            chosen[site] = after
    while True:
        fitting = [
            (_slope(chosen[site], option), site, option)
            for site, each in enumerate(options)
            for option in each
            if 0 < option.parameters - chosen[site].parameters <= left and option.loss < chosen[site].loss
        ]
        if not fitting:
            return [option.rank for option in chosen]
        _, site, option = max(fitting, key=lambda found: found[0])
        left -= option.parameters - chosen[site].parameters
        chosen[site] = option


def equal_shares(gain_K: Tensor) -> Tensor:
    """Gains as shares of their sum, so that large matrices do not count for more; all zero where nothing was seen."""
    total = gain_K.double().sum()
    return gain_K.double() / total if total > 0 else torch.zeros_like(gain_K, dtype=torch.float64)


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options that some price per parameter would choose."""
    hull: list[Option] = []
    for option in options:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(before: Option, after: Option) -> float:
    return (before.loss - after.loss) / (after.parameters - before.parameters)
