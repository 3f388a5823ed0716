"""The best low-rank approximation of a linear for its inputs. O = outputs, I = inputs, R = rank.

K = min(O, I). A metric describes the inputs: None (all directions alike), a vector of I weights (squared magnitudes of
channels), or their Gram matrix I×I. Everything is computed in float64, because spectra span many orders of magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.numerics.grid import output_error


@dataclass(frozen=True)
class Factors:
    """`left_OR @ right_RI` in place of a weight."""

    left_OR: Tensor
    right_RI: Tensor

    def product(self) -> Tensor:
        """The matrix they stand for, O×I."""
        return self.left_OR @ self.right_RI


@dataclass(frozen=True)
class Spectrum:
    """Orthonormal directions of the output, strongest first, and the squared output along each."""

    basis_OK: Tensor
    energy_K: Tensor

    def discarded(self, rank: int) -> float:
        """Squared output error of the best approximation of that rank."""
        return float(self.energy_K[rank:].sum())

    def lost(self, rank: int) -> float:
        """The same as a fraction of the squared output; 0 if that is 0."""
        total = float(self.energy_K.sum())
        return self.discarded(rank) / total if total > 0 else 0.0


def output_spectrum(weight_OI: Tensor, metric: Tensor | None) -> Spectrum:
    """How the squared output Σ|W x|² is spread over directions of the output.

    The approximation of rank R that loses least keeps the first R directions U and is U Uᵀ W: the same product as
    SVD-LLM's `U Σ Vᵀ S⁻¹` with S Sᵀ = metric, because Σ Vᵀ = Uᵀ W S. No S is factored and none inverted, so inputs
    that never occur, or fewer tokens than channels, are no trouble.

    Source: Wang et al., arXiv 2403.07378 (whitening); Yuan et al., arXiv 2312.05821 (a diagonal metric).
    """
    weight_OI = weight_OI.double()
    basis_OK, small_KI = None, weight_OI
    if weight_OI.shape[0] > weight_OI.shape[1]:
        # all outputs lie in the column space of W: look for directions there, in a smaller matrix
        basis_OK, small_KI = torch.linalg.qr(weight_OI)
    energy_K, directions_KK = torch.linalg.eigh(_seen(small_KI, metric))
    directions_KK = directions_KK.flip(1)
    return Spectrum(
        directions_KK if basis_OK is None else basis_OK @ directions_KK,
        energy_K.flip(0).clamp_min(0),
    )


def leading_factors(weight_OI: Tensor, gram_II: Tensor, rank: int, start_OR: Tensor | None = None) -> Factors:
    """Nearly the best factors of that rank, in the weight's dtype and far cheaper than the whole spectrum.

    Subspace iteration from `start_OR`, left factors of a weight like this one, or from random directions.

    Source: Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.3.
    """
    outputs, inputs = weight_OI.shape
    missing = min(rank + _SPARE, outputs, inputs) - (0 if start_OR is None else start_OR.shape[1])
    generator = torch.Generator().manual_seed(0)
    random_OR = torch.randn(outputs, missing, generator=generator).to(weight_OI)
    basis_OR = random_OR if start_OR is None else torch.cat([start_OR, random_OR], 1)
    for _ in range(_ROUNDS):
        basis_OR = torch.linalg.qr(weight_OI @ (gram_II @ (weight_OI.T @ basis_OR))).Q
    small_RI = basis_OR.T @ weight_OI
    _, directions_RR = torch.linalg.eigh(small_RI @ gram_II @ small_RI.T)
    left_OR = basis_OR @ directions_RR.flip(1)[:, :rank]
    return Factors(left_OR, left_OR.T @ weight_OI)


_SPARE = 8
"""Directions beside those that are kept: the last ones converge slowly."""
_ROUNDS = 3


def truncate(weight_OI: Tensor, spectrum: Spectrum, rank: int) -> Factors:
    """Keep the first `rank` directions; factors in the weight's dtype.

    The left factor has orthonormal columns and the right one gives outputs of natural size: of all ways to share the
    singular values out, the one that loses least when factors are rounded afterwards.
    """
    left_OR = spectrum.basis_OK[:, :rank]
    right_RI = left_OR.T @ weight_OI.double()
    return Factors(left_OR.to(weight_OI.dtype).contiguous(), right_RI.to(weight_OI.dtype))


def best_left(target_OI: Tensor, right_RI: Tensor, gram_II: Tensor) -> Tensor:
    """The left factor that loses least for a given right one: `T G Rᵀ (R G Rᵀ)⁺`."""
    right_RI, gram_II = right_RI.double(), gram_II.double()
    seen_IR = gram_II @ right_RI.T
    left_OR = target_OI.double() @ seen_IR @ _inverse(right_RI @ seen_IR)
    return left_OR.to(target_OI.dtype)


def best_right(target_OI: Tensor, left_OR: Tensor) -> Tensor:
    """The right factor that loses least for a given left one, whatever the inputs: `(Lᵀ L)⁺ Lᵀ T`."""
    left = left_OR.double()
    return (_inverse(left.T @ left) @ (left.T @ target_OI.double())).to(target_OI.dtype)


def relative_output_error(weight_OI: Tensor, instead_OI: Tensor, gram_II: Tensor) -> float:
    """Squared error of the outputs ÷ squared outputs, in the weight's dtype; 0 when there were none."""
    whole = float(output_error(weight_OI, gram_II))
    return float(output_error(instead_OI - weight_OI, gram_II)) / whole if whole > 0 else 0.0


def break_even(outputs: int, inputs: int) -> int:
    """The least rank at which two factors have no fewer parameters than the matrix."""
    return -(-outputs * inputs // (outputs + inputs))


def _seen(weight_KI: Tensor, metric: Tensor | None) -> Tensor:
    """W · metric · Wᵀ."""
    if metric is None:
        return weight_KI @ weight_KI.T
    metric = metric.double()
    seen_KI = weight_KI * metric if metric.ndim == 1 else weight_KI @ metric
    return seen_KI @ weight_KI.T


def _inverse(matrix_RR: Tensor) -> Tensor:
    """Pseudo-inverse of a symmetric, positive semi-definite matrix."""
    inverse_RR: Tensor = torch.linalg.pinv(matrix_RR, rtol=1e-10, hermitian=True)
    return inverse_RR
