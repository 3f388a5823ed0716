"""Tensor trains: a vector or matrix reshaped to many short axes, as a chain of small cores.

V = tensors in a batch, D = their size, d axes of lengths I₁ … I_d (D = I₁ · … · I_d), bonds of ranks R₁ … R_{d-1}
between neighbouring cores; core k of one tensor is R_{k-1} × I_k × R_k, and R₀ = R_d = 1. O = outputs, I = inputs.
Computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_AT_ONCE = 1 << 22
"""Numbers in one batch of singular value decompositions: 32 MB in float64."""


def balanced_factors(number: int, ways: int) -> tuple[int, ...]:
    """`number` as a product of `ways` factors, rising, with the least sum: a prime keeps ones beside it."""
    return min(_factorisations(number, ways, 1), key=lambda found: (sum(found), found))


def matrix_axes(outputs: int, inputs: int, ways: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of the two sides of a matrix; long output axes stand by short input axes, so that cores are of one size."""
    return balanced_factors(outputs, ways), balanced_factors(inputs, ways)[::-1]


def full_ranks(axes: Sequence[int]) -> tuple[int, ...]:
    """The ranks at which a train holds any tensor."""
    return tuple(min(math.prod(axes[:bond]), math.prod(axes[bond:])) for bond in range(1, len(axes)))


def train_parameters(axes: Sequence[int], ranks: Sequence[int]) -> int:
    """Numbers in the cores of one tensor."""
    bonds = (1, *ranks, 1)
    return sum(left * axis * right for left, axis, right in zip(bonds[:-1], axes, bonds[1:], strict=True))


def decompose(tensors_VD: Tensor, axes: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """Each tensor's own train, all with these ranks (or the full ones, where those are less); cores V×R×I×R.

    Source: Oseledets, SIAM J. Sci. Comput. 33 (2011), Algorithm 1; Xu et al., arXiv 2307.00526 (TensorGPT): the rows of
    an embedding one by one, so that a changed vocabulary needs no new fit of the others.
    """
    return _sweep(tensors_VD, axes, lambda bond, _: ranks[bond])


def decompose_within(tensors_VD: Tensor, axes: Sequence[int], tolerance: float) -> list[Tensor]:
    """The least ranks, alike for all tensors, at which ‖error‖ ≤ tolerance · ‖tensors‖ in the Frobenius norm.

    Source: Oseledets 2011, Theorem 2.2: every bond may discard δ = tolerance · ‖tensors‖ / √(d - 1).
    """
    allowed = tolerance**2 * float(tensors_VD.double().square().sum()) / max(len(axes) - 1, 1)
    return _sweep(tensors_VD, axes, lambda _, energy_K: _least_rank(energy_K, allowed))


def compose(cores: Sequence[Tensor]) -> Tensor:
    """The tensors V×D that the cores V×R×I×R stand for, in their dtype."""
    product_VDR = cores[0].flatten(1, 2)
    for core_VRIS in cores[1:]:
        product_VDR = (product_VDR @ core_VRIS.flatten(2)).reshape(len(core_VRIS), -1, core_VRIS.shape[-1])
    return product_VDR.flatten(1)


def ranks_within(tensor_D: Tensor, axes: Sequence[int], parameters: int) -> tuple[int, ...]:
    """The ranks of one tensor's train that fit so many parameters, every bond discarding about as much; at least 1."""
    energies = [_unfolding_energy(tensor_D.double(), axes, bond) for bond in range(1, len(axes))]
    total = float(tensor_D.double().square().sum())
    low, high = -80.0, 0.0
    best = (1,) * len(energies)
    for _ in range(60):
        middle = (low + high) / 2
        ranks = tuple(_least_rank(energy_K, total * math.exp(middle)) for energy_K in energies)
        if train_parameters(axes, ranks) <= parameters:
            best, high = ranks, middle
        else:
            low = middle
    return best


def matrix_to_tensor(weight_OI: Tensor, outputs: Sequence[int], inputs: Sequence[int]) -> Tensor:
    """The entries in the order of a train whose axis k is output axis k together with input axis k."""
    ways = len(outputs)
    paired = [axis for k in range(ways) for axis in (k, ways + k)]
    return weight_OI.reshape(*outputs, *inputs).permute(paired).reshape(-1)


def tensor_to_matrix(tensor_D: Tensor, outputs: Sequence[int], inputs: Sequence[int]) -> Tensor:
    """The inverse of `matrix_to_tensor`."""
    ways = len(outputs)
    paired = [size for pair in zip(outputs, inputs, strict=True) for size in pair]
    back = [*range(0, 2 * ways, 2), *range(1, 2 * ways, 2)]
    return tensor_D.reshape(paired).permute(back).reshape(math.prod(outputs), math.prod(inputs))


def _sweep(tensors_VD: Tensor, axes: Sequence[int], choose: Callable[[int, Tensor], int]) -> list[Tensor]:
    """`choose` gives a bond's rank from its squared singular values, summed over all tensors."""
    count = len(tensors_VD)
    assert tensors_VD.shape[1] == math.prod(axes), f"{tuple(axes)} do not multiply to {tensors_VD.shape[1]}"
    rest, rank, cores = tensors_VD.double(), 1, []
    for bond, axis in enumerate(axes[:-1]):
        rest_VAB = rest.reshape(count, rank * axis, -1)
        directions_VAK, energy_K = _left_directions(rest_VAB)
        kept = max(1, min(choose(bond, energy_K), directions_VAK.shape[2]))
        core_VAK = directions_VAK[:, :, :kept]
        rest = core_VAK.mT @ rest_VAB
        cores.append(core_VAK.reshape(count, rank, axis, kept))
        rank = kept
    cores.append(rest.reshape(count, rank, axes[-1], 1))
    return [core.to(tensors_VD.dtype).contiguous() for core in cores]


def _left_directions(matrices_VAB: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors of every matrix, strongest first, and the energy of each place over all matrices."""
    step = max(1, _AT_ONCE // math.prod(matrices_VAB.shape[1:]))
    parts = [torch.linalg.svd(some_CAB, full_matrices=False)[:2] for some_CAB in torch.split(matrices_VAB, step)]
    energy_K = torch.stack([values_CK.square().sum(0) for _, values_CK in parts]).sum(0)
    return torch.cat([directions_CAK for directions_CAK, _ in parts]), energy_K


def _unfolding_energy(tensor_D: Tensor, axes: Sequence[int], bond: int) -> Tensor:
    unfolding_AB = tensor_D.reshape(math.prod(axes[:bond]), -1)
    wide = unfolding_AB.shape[0] <= unfolding_AB.shape[1]
    gram = unfolding_AB @ unfolding_AB.T if wide else unfolding_AB.T @ unfolding_AB
    energy_K: Tensor = torch.linalg.eigvalsh(gram)
    return energy_K.flip(0).clamp_min(0)


def _least_rank(energy_K: Tensor, allowed: float) -> int:
    """The fewest places to keep so that the others together hold no more than allowed; at least one."""
    discarded_K = energy_K.flip(0).cumsum(0).flip(0)
    return max(1, int((discarded_K > allowed).sum()))


def _factorisations(number: int, ways: int, least: int) -> Iterator[tuple[int, ...]]:
    """All rising factorisations; those with ones only where nothing else is left."""
    if ways == 1:
        yield (number,)
        return
    for factor in range(least, math.isqrt(number) + 1):
        if number % factor == 0:
            for others in _factorisations(number // factor, ways - 1, factor):
                if others[0] >= factor:
                    yield (factor, *others)
