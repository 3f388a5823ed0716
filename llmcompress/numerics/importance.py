"""The importance of units of a width group, from weights, gradients and activations.

A unit (an FFN channel, a key-value group) owns rows of some linears and columns of others. O = outputs, I = inputs, U =
units, S = samples. `unit_of_I` gives each column's unit, -1 for columns of none. In the dtype of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ElementScore = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Weight, mean gradient and mean squared gradient per sample → how much each weight matters."""


def per_unit(values_I: Tensor, unit_of_I: Tensor, units: int) -> Tensor:
    """The sum of the values of each unit's rows or columns."""
    place_I = torch.where(unit_of_I < 0, units, unit_of_I)  # the last place takes what belongs to no unit
    return values_I.new_zeros(units + 1).index_add(0, place_I, values_I)[:units]


def first_order(weight: Tensor, gradient: Tensor, squared: Tensor) -> Tensor:
    """|w g|: the loss that zeroing each weight alone would add, to first order.

    Source: Ma et al., arXiv 2305.11627 (element-wise, `param_first`).
    """
    return (weight * gradient).abs()


def second_order(weight: Tensor, gradient: Tensor, squared: Tensor) -> Tensor:
    """|w H w| with the diagonal of the Fisher information for H.

    Source: Ma et al., arXiv 2305.11627 (`param_second`).
    """
    return weight.square() * squared


def mixed_order(weight: Tensor, gradient: Tensor, squared: Tensor) -> Tensor:
    """|w g - w H w / 2|: both orders of the Taylor expansion.

    Source: Ma et al., arXiv 2305.11627, eq. 5 (`param_mix`).
    """
    return (weight * gradient - 0.5 * weight.square() * squared).abs()


def output_products(weight_OI: Tensor, gram_II: Tensor, unit_of_I: Tensor, units: int) -> Tensor:
    """U×U: the inner product, over all tokens and outputs, of what any two units add to a linear's output."""
    return _per_pair((weight_OI.T @ weight_OI) * gram_II, unit_of_I, units)


def similarity(gram_II: Tensor, unit_of_I: Tensor, units: int) -> Tensor:
    """U×U, 0 … 1: how alike the activations of two units are; for units of one column their |cosine|.

    For wider units it is |G_uv| / √(|G_uu| |G_vv|) in the Frobenius norm.
    """
    norm_UU = _per_pair(gram_II.square(), unit_of_I, units).sqrt()
    own_U = norm_UU.diagonal().sqrt().clamp_min(torch.finfo(gram_II.dtype).tiny)
    return (norm_UU / own_U / own_U[:, None]).clamp(0, 1)


def unique_importance(importance_U: Tensor, similarity_UU: Tensor) -> Tensor:
    """Importance, lessened by the likeness to the most similar unit that matters more.

    Source: Santacroce et al., arXiv 2302.03773 (cosine similarity as the measure of redundancy). Differs: one shot
    and without training; of two similar units only the lesser one is punished.
    """
    order_U = importance_U.argsort(descending=True, stable=True)
    ordered_UU = similarity_UU[order_U][:, order_U].tril(-1)
    result_U = torch.empty_like(importance_U)
    result_U[order_U] = importance_U[order_U] * (1 - ordered_UU.amax(1).to(importance_U.dtype))
    return result_U


def standardised(scores_U: Tensor) -> Tensor:
    """Zero mean, unit deviation: makes scores of different layers comparable.

    Source: An et al., arXiv 2312.11983, eq. 6.
    """
    centred_U = scores_U - scores_U.mean()
    deviation = centred_U.square().mean().sqrt()
    return centred_U / deviation if float(deviation) > 0 else centred_U


def rearranged(fisher_UU: Tensor, removed_U: Tensor) -> Tensor:
    """The same number of units removed, swapped one pair at a time while that lowers the sum of Fisher entries.

    That sum, over all pairs of removed units, is the second-order loss of removing them together; the diagonal alone
    misses that two units may compensate each other. Each swap is the best one; at most as many as units are removed.

    Source: Kwon et al., arXiv 2204.09656, section 4.2.
    """
    removed_U = removed_U.clone()
    diagonal_U = fisher_UU.diagonal()
    for _ in range(int(removed_U.sum())):
        out, kept = removed_U.nonzero().flatten(), (~removed_U).nonzero().flatten()
        if not len(kept):
            break
        with_removed_U = fisher_UU[:, out].sum(1)
        back_R = diagonal_U[out] - 2 * with_removed_U[out]
        away_K = diagonal_U[kept] + 2 * with_removed_U[kept]
        change_RK = back_R[:, None] + away_K[None, :] - 2 * fisher_UU[out][:, kept]
        best = int(change_RK.argmin())
        if not float(change_RK.flatten()[best]) < -1e-9 * float(diagonal_U.abs().sum()):
            break
        removed_U[out[best // len(kept)]] = False
        removed_U[kept[best % len(kept)]] = True
    return removed_U


def _per_pair(values_II: Tensor, unit_of_I: Tensor, units: int) -> Tensor:
    """The sum of the values of each pair of units."""
    place_I = torch.where(unit_of_I < 0, units, unit_of_I)
    rows_UI = values_II.new_zeros(units + 1, len(unit_of_I)).index_add(0, place_I, values_II)
    return rows_UI.new_zeros(units + 1, units + 1).index_add(1, place_I, rows_UI)[:units, :units]
