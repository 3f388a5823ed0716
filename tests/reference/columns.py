"""Optimal brain surgeon by the book: invert what is left of the Hessian again after every column, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def remove_one_column_at_a_time(
    weight_OI: Tensor, damped_gram_II: Tensor, treat: Callable[[int, Tensor, Tensor], Tensor]
) -> Tensor:
    """`treat(column, weights from that column on, weight)` gives the new column; its error is repaired to the right."""
    weight_OI = weight_OI.double().clone()
    for column in range(weight_OI.shape[1]):
        inverse = torch.linalg.inv(damped_gram_II[column:, column:].double())
        new_O = treat(column, weight_OI[:, column:].clone(), weight_OI[:, column].clone())
        error_O = (weight_OI[:, column] - new_O) / inverse[0, 0]
        weight_OI[:, column:] -= error_O[:, None] * inverse[0][None, :]
        weight_OI[:, column] = new_O
    return weight_OI
