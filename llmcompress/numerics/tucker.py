"""Tucker decomposition of a tensor with axes A, B, C: a thin factor along each (ranks a, b, c) around a small core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_AXES = 3


@dataclass(frozen=True)
class Tucker:
    """`core_abc` multiplied along each axis by an orthonormal factor: A×a, B×b, C×c."""

    core_abc: Tensor
    factors: tuple[Tensor, Tensor, Tensor]

    def compose(self) -> Tensor:
        """The tensor A×B×C they stand for."""
        a, b, c = self.factors
        return torch.einsum("abc,Aa,Bb,Cc->ABC", self.core_abc, a, b, c)


def tucker_parameters(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Numbers in the factors and the core."""
    core = ranks[0] * ranks[1] * ranks[2]
    return core + sum(size * rank for size, rank in zip(shape, ranks, strict=True))


def higher_order_svd(tensor_ABC: Tensor, ranks: Sequence[int]) -> Tucker:
    """Every factor holds the strongest directions of its own axis, the others left whole.

    Source: De Lathauwer et al., SIAM J. Matrix Anal. 21 (2000) 1253. In float64; the result too.
    """
    tensor_ABC = tensor_ABC.double()
    return _with_factors(tensor_ABC, [_strongest(tensor_ABC, axis, ranks[axis])[0] for axis in range(_AXES)])


def higher_order_iteration(tensor_ABC: Tensor, ranks: Sequence[int], *, sweeps: int = 20) -> Tucker:
    """Improve one factor after the other, each best for what the other two keep; never worse than where it begins.

    Source: De Lathauwer et al., SIAM J. Matrix Anal. 21 (2000) 1324 (HOOI), begun with the higher-order SVD.
    """
    tensor_ABC = tensor_ABC.double()
    found = higher_order_svd(tensor_ABC, ranks)
    kept = float(found.core_abc.square().sum())
    for _ in range(sweeps):
        factors = list(found.factors)
        for axis in range(_AXES):
            narrow = tensor_ABC
            for other in range(_AXES):
                if other != axis:
                    narrow = _multiply(narrow, other, factors[other].T)
            factors[axis] = _strongest(narrow, axis, ranks[axis])[0]
        found, before = _with_factors(tensor_ABC, factors), kept
        kept = float(found.core_abc.square().sum())
        if kept <= before * (1 + 1e-9):
            break
    return found


def tucker_ranks(tensor_ABC: Tensor, parameters: int) -> tuple[int, int, int] | None:
    """Ranks that fit so many parameters: directions go one by one, the least energy per parameter saved first.

    None when not even ranks of one fit.
    """
    tensor_ABC = tensor_ABC.double()
    shape = list(tensor_ABC.shape)
    energies = [_strongest(tensor_ABC, axis, 1)[1].tolist() for axis in range(_AXES)]
    ranks = [
        min(size, tensor_ABC.numel() // size) for size in shape
    ]  # an axis longer than the two others together has no more directions than those
    while tucker_parameters(shape, ranks) > parameters:
        candidates = []
        for axis in range(_AXES):
            if ranks[axis] > 1:
                fewer = [rank - (other == axis) for other, rank in enumerate(ranks)]
                saved = tucker_parameters(shape, ranks) - tucker_parameters(shape, fewer)
                candidates.append((energies[axis][ranks[axis] - 1] / saved, axis))
        if not candidates:
            return None
        ranks[min(candidates)[1]] -= 1
    # a rank above the product of the two others adds nothing to the core
    for axis in range(_AXES):
        others = [ranks[other] for other in range(_AXES) if other != axis]
        ranks[axis] = min(ranks[axis], others[0] * others[1])
    return ranks[0], ranks[1], ranks[2]


def _with_factors(tensor_ABC: Tensor, factors: Sequence[Tensor]) -> Tucker:
    core = tensor_ABC
    for axis in range(_AXES):
        core = _multiply(core, axis, factors[axis].T)
    return Tucker(core, (factors[0], factors[1], factors[2]))


def _strongest(tensor: Tensor, axis: int, rank: int) -> tuple[Tensor, Tensor]:
    """The leading directions of an axis as columns, and the energy of all of them, falling."""
    unfolded_AX = tensor.movedim(axis, 0).flatten(1)
    energy_A, directions_AA = torch.linalg.eigh(unfolded_AX @ unfolded_AX.T)
    return directions_AA.flip(1)[:, :rank], energy_A.flip(0).clamp_min(0)


def _multiply(tensor: Tensor, axis: int, matrix_XA: Tensor) -> Tensor:
    """The tensor with one axis multiplied by a matrix."""
    product: Tensor = torch.tensordot(matrix_XA, tensor, dims=([1], [axis]))
    return product.movedim(0, axis)
