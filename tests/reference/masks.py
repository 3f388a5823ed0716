"""Which weights to drop, one comparison at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def smallest_of(scores: list[float], count: int) -> list[bool]:
    """True for the `count` smallest; the first ones among equals."""
    order = sorted(range(len(scores)), key=lambda place: (scores[place], place))
    return [place in set(order[:count]) for place in range(len(scores))]


def per_row(score_OI: Tensor, share: float) -> Tensor:
    """So many of each row that after every row the rounded share of all weights so far is dropped."""
    rows, dropped = [], 0
    for number, row in enumerate(score_OI.tolist(), start=1):
        wanted = math.floor(share * (number * len(row)) + 0.5) - dropped
        rows.append(smallest_of(row, wanted))
        dropped += wanted
    return torch.tensor(rows)


def per_group(score_OI: Tensor, zeros: int, of: int) -> Tensor:
    """So many of every few neighbours."""
    rows = []
    for row in score_OI.tolist():
        groups = [smallest_of(row[start : start + of], zeros) for start in range(0, len(row), of)]
        rows.append([each for group in groups for each in group])
    return torch.tensor(rows)


def sparsegpt(
    weight_OI: Tensor, damped_gram_II: Tensor, *, share: float, span: int, pattern: tuple[int, int] | None
) -> Tensor:
    """Algorithm 1 of arXiv 2301.00774 with a fresh inverse for every column."""
    weight_OI = weight_OI.double().clone()
    outputs, inputs = weight_OI.shape
    dropped_OI = weight_OI == 0
    span = pattern[1] if pattern else span
    for column in range(inputs):
        if column % span == 0:
            stop = min(column + span, inputs)
            saliency_OS = torch.stack(
                [weight_OI[:, j].square() / _first_of_inverse(damped_gram_II, j) for j in range(column, stop)], dim=1
            ).masked_fill(dropped_OI[:, column:stop], -1.0)
            if pattern:
                chosen_OS = per_group(saliency_OS, *pattern)
            else:
                wanted = math.floor(share * (outputs * stop) + 0.5) - math.floor(share * (outputs * column) + 0.5)
                # columns first: the order of the sweep decides ties
                flat = smallest_of(saliency_OS.T.flatten().tolist(), wanted)
                chosen_OS = torch.tensor(flat).view(stop - column, outputs).T
            dropped_OI[:, column:stop] |= chosen_OS
        inverse = torch.linalg.inv(damped_gram_II[column:, column:].double())
        error_O = torch.where(dropped_OI[:, column], weight_OI[:, column], 0.0) / inverse[0, 0]
        weight_OI[:, column:] -= error_O[:, None] * inverse[0][None, :]
        weight_OI[:, column].masked_fill_(dropped_OI[:, column], 0.0)
    return weight_OI


def _first_of_inverse(gram_II: Tensor, column: int) -> Tensor:
    return torch.linalg.inv(gram_II[column:, column:].double())[0, 0]
