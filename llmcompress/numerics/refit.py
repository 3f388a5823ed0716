"""Compensates for removed inputs of a linear in the remaining ones. O = outputs, I = inputs, K = kept inputs, U =
units.

All functions use statistics of the input over the calibration data: its Gram matrix and its mean. Float64 inside.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmcompress.numerics.columns import inverse_factor
from llmcompress.numerics.grid import output_error

LARGEST_SCALE = 10.0
"""A scale above this means that the least squares problem is nearly singular: leave the weights as they were."""


@dataclass(frozen=True)
class Refitted:
    """New weights, zero in the columns of removed inputs; what to add to the bias; squared output errors."""

    weight_OI: Tensor
    bias_O: Tensor | None
    error: float | None
    """Squared error of the output ÷ squared output, over the calibration data, a change of the bias included."""
    error_deleted: float | None
    """The same when the removed inputs are only deleted."""
    degraded: str | None = None
    """Why the weights were only deleted."""


def deleted(weight_OI: Tensor, gram_II: Tensor | None, kept_I: Tensor) -> Refitted:
    """The removed inputs are gone and nothing else changes. `kept_I` is True for inputs that stay."""
    new_OI = weight_OI * kept_I
    error = None if gram_II is None else relative_error(new_OI, weight_OI, gram_II)
    return Refitted(new_OI, None, error, error)


def refit_columns(
    weight_OI: Tensor, gram_II: Tensor, kept_I: Tensor, *, damping: float, mean_I: Tensor | None = None, tokens: int = 0
) -> Refitted:
    """Least squares: the kept columns take over what the removed ones gave, as far as the inputs are correlated.

    W' = W_K + W_R G_RK (G_KK + λ)⁻¹, the least of |W'x_K - Wx|² + λ |W' - W_K|², so never worse than deleting. With
    `mean_I` the linear has a bias: inputs are centred and the bias takes the mean. Weights that were exactly zero stay
    zero.

    Source: He et al., arXiv 1707.06168, eq. 5; the same solve as optimal brain surgeon. Differs: λ pulls towards the
    old weights, not towards zero.
    """
    plain = deleted(weight_OI, gram_II, kept_I)
    weight64_OI, gram64_II = weight_OI.double(), gram_II.double()
    centred_II = gram64_II
    if mean_I is not None:
        centred_II = gram64_II - tokens * torch.outer(mean_I.double(), mean_I.double())
    kept, removed = kept_I.nonzero().flatten(), (~kept_I).nonzero().flatten()
    factor = inverse_factor(centred_II[kept][:, kept], damping)
    if factor is None:
        why = "its inputs were always zero" if not bool(gram_II.any()) else "its Gram matrix is singular"
        return replace(plain, degraded=f"{why}: not refitted")
    missing_OK = weight64_OI[:, removed] @ centred_II[removed][:, kept]
    kept_OK = weight64_OI[:, kept]
    kept_OK = (kept_OK + missing_OK @ factor.upper_II.T @ factor.upper_II) * (kept_OK != 0)
    new_OI = torch.zeros_like(weight64_OI)
    new_OI[:, kept] = kept_OK
    bias_O = None if mean_I is None else (weight64_OI - new_OI) @ mean_I.double()
    error = relative_error(new_OI, weight64_OI, gram64_II, bias_O, mean_I, tokens)
    if plain.error is not None and not error <= plain.error:
        return replace(plain, degraded="a refit was worse: not refitted")
    return Refitted(new_OI.to(weight_OI.dtype), _like(bias_O, weight_OI), error, plain.error_deleted)


def refit_bias(weight_OI: Tensor, gram_II: Tensor, kept_I: Tensor, *, mean_I: Tensor, tokens: int) -> Refitted:
    """The bias takes over the mean of what the removed inputs gave.

    Source: An et al., arXiv 2312.11983, eq. 7 (FLAP's baseline bias compensation).
    """
    plain = deleted(weight_OI, gram_II, kept_I)
    bias_O = (weight_OI - plain.weight_OI).double() @ mean_I.double()
    error = relative_error(plain.weight_OI, weight_OI, gram_II, bias_O, mean_I, tokens)
    return Refitted(plain.weight_OI, _like(bias_O, weight_OI), error, plain.error_deleted)


def refit_scales(
    weight_OI: Tensor, gram_II: Tensor, kept_I: Tensor, products_UU: Tensor, unit_of_I: Tensor, *, damping: float
) -> Refitted:
    """Least squares with one number per kept unit, multiplied into its columns.

    `products_UU` are the inner products of the units' outputs (`importance.output_products`). When a scale exceeds
    10 the weights stay as they were.

    Source: Kwon et al., arXiv 2204.09656, section 4.3. Differs: fitted to the consumer's own output, without LSMR.
    """
    plain = deleted(weight_OI, gram_II, kept_I)
    owner_I = unit_of_I.clamp_min(0)
    used_U = torch.zeros(len(products_UU), dtype=torch.bool, device=kept_I.device)
    used_U[unit_of_I[kept_I & (unit_of_I >= 0)]] = True
    kept, removed = used_U.nonzero().flatten(), (~used_U).nonzero().flatten()
    products_UU = products_UU.double()
    factor = inverse_factor(products_UU[kept][:, kept], damping)
    if factor is None:
        return replace(plain, degraded="its outputs were zero: not scaled")
    extra_K = factor.upper_II.T @ (factor.upper_II @ products_UU[kept][:, removed].sum(1))
    scales_U = torch.zeros_like(products_UU[0])
    scales_U[kept] = 1 + extra_K
    if float(scales_U.abs().max()) > LARGEST_SCALE:
        return replace(plain, degraded="a scale was above 10: not scaled")
    scales_I = torch.where(unit_of_I < 0, 1.0, scales_U[owner_I])
    new_OI = (weight_OI * scales_I * kept_I).to(weight_OI.dtype)
    error = relative_error(new_OI, weight_OI, gram_II)
    if plain.error is not None and not error <= plain.error:
        return replace(plain, degraded="scales were worse: not scaled")
    return Refitted(new_OI, None, error, plain.error_deleted)


def relative_error(
    new_OI: Tensor,
    weight_OI: Tensor,
    gram_II: Tensor,
    bias_O: Tensor | None = None,
    mean_I: Tensor | None = None,
    tokens: int = 0,
) -> float:
    """Σ over tokens of |(W' - W)x + b|² ÷ Σ |Wx|²; 0 where both are."""
    gram64_II, weight64_OI = gram_II.double(), weight_OI.double()
    change_OI = new_OI.double() - weight64_OI
    error = float(output_error(change_OI, gram64_II))
    if bias_O is not None and mean_I is not None:
        shift_O = change_OI @ mean_I.double()
        error += tokens * float((2 * bias_O * shift_O + bias_O.square()).sum())
    whole = float(output_error(weight64_OI, gram64_II))
    return max(error, 0.0) / whole if whole > 0 else 0.0


def _like(values: Tensor | None, other: Tensor) -> Tensor | None:
    return None if values is None else values.to(other.dtype)
