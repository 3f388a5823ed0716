"""Orthonormal bases: principal directions, random ones, zero-mean frames. D = width, K = kept, T = tokens."""

from __future__ import annotations

import torch
from torch import Tensor


class SecondMoment:
    """Sum over tokens of x xᵀ, every token brought to unit mean square first: as a norm sees it.

    A stream grows from block to block, and some tokens are a thousand times longer than others; without unit lengths
    they alone would decide. One product is summed in float32, products are summed in float64.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum_DD = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, x_TD: Tensor) -> None:
        """Take in more tokens; one that is all zeros stays so."""
        x_TD = x_TD.float()
        square_T1 = x_TD.square().mean(1, keepdim=True)
        x_TD = x_TD * square_T1.clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
        self.sum_DD += (x_TD.T @ x_TD).double()


def principal_basis(moment_DD: Tensor) -> Tensor:
    """Columns: eigenvectors of a symmetric matrix by falling eigenvalue, in float64.

    No damping: a multiple of the identity changes no eigenvector.
    """
    moment_DD = moment_DD.double()
    vectors_DD: Tensor = torch.linalg.eigh((moment_DD + moment_DD.T) / 2).eigenvectors
    return vectors_DD.flip(1)


def random_basis(width: int, generator: torch.Generator) -> Tensor:
    """Columns: an orthonormal basis uniform over all of them, in float64."""
    normal_DD = torch.randn(width, width, generator=generator, dtype=torch.float64)
    basis_DD, triangle_DD = torch.linalg.qr(normal_DD)
    uniform_DD: Tensor = basis_DD * triangle_DD.diagonal().sign()  # without the signs it is not
    return uniform_DD


def zero_mean_frame(width: int) -> Tensor:
    """`width - 1` orthonormal rows of that width, each with mean zero, in float64: almost the first unit vectors.

    Rows of the reflection that swaps the last unit vector and the direction of all ones.
    """
    ones = torch.full((width,), width**-0.5, dtype=torch.float64)
    last = torch.zeros(width, dtype=torch.float64)
    last[-1] = 1.0
    return reflected(torch.eye(width, dtype=torch.float64)[:-1], ones - last)


def reflected(x_ND: Tensor, normal_D: Tensor) -> Tensor:
    """Rows mirrored in the hyperplane with that normal, whatever its length; a zero normal changes nothing."""
    squared = normal_D.square().sum()
    return x_ND if squared == 0 else x_ND - torch.outer(x_ND @ normal_D, normal_D) * (2 / squared)


def mirror_normal(width: int, generator: torch.Generator) -> Tensor:
    """A random direction with mean zero: mirroring along it keeps the direction of all ones as it is; float64."""
    normal_D = torch.randn(width, generator=generator, dtype=torch.float64)
    return normal_D - normal_D.mean()


def refitted(moment_DD: Tensor, kept_DK: Tensor, *, damping: float) -> Tensor:
    """D×K: by which a reader of the whole stream is best replaced by one of the kept directions.

    W A xₖ with A = (M Q + λQ)(Qᵀ M Q + λ)⁻¹ is the least squares estimate of W x from xₖ = Qᵀ x, given the second
    moment M; Q itself when Q holds eigenvectors of M, or all directions. λ pulls towards Q.
    """
    moment_DD, kept_DK = moment_DD.double(), kept_DK.double()
    cross_DK = moment_DD @ kept_DK
    inner_KK = kept_DK.T @ cross_DK
    extra = damping * float(inner_KK.diagonal().mean())
    if extra == 0.0:  # nothing was seen
        return kept_DK
    inner_KK.diagonal().add_(extra)
    estimate_DK: Tensor = torch.linalg.solve(inner_KK, (cross_DK + extra * kept_DK).T).T
    return estimate_DK
