"""Orthogonal matrices that spread one channel evenly over all: Hadamard matrices and Kronecker products of them.

D = width, K = dimensions kept. A matrix of any width is a product of small factors, D = d₁ d₂ …, and is applied factor
by factor: D (d₁ + d₂ + …) multiplications instead of D². The first row of every factor is constant, and so is that of
the whole.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from llmcompress.numerics.basis import random_basis, zero_mean_frame

_LARGEST_SYLVESTER = 64
"""Powers of two are cut into factors of at most this size: two small products are faster than many butterflies."""

_LARGEST_PALEY = 512
"""Beyond this a Hadamard factor would cost more than the Hartley matrix of the odd part loses."""


@cache
def hadamard_factors(width: int) -> tuple[Tensor, ...]:
    """Orthonormal factors, float64, on the CPU, whose Kronecker product is a matrix of that width.

    A Hadamard matrix (all entries ±D^-½) where one is known: Sylvester's for powers of two, times one of Paley's. For
    other widths an odd factor is the Hartley matrix, whose largest entry is at most √2 times that.

    Source: Sylvester 1867; Paley, J. Math. Phys. 12 (1933); Hartley, Proc. IRE 30 (1942).
    """
    odd, twos = width, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    if odd == 1:
        return _sylvester_factors(twos)
    for used in range(2, twos + 1):
        found = _paley(odd << used) if odd << used <= _LARGEST_PALEY else None
        if found is not None:
            return (*_sylvester_factors(twos - used), found)
    return (*_sylvester_factors(twos), _hartley(odd))


def transformed(x: Tensor, width: int, *, inverse: bool = False) -> Tensor:
    """The last axis multiplied by that matrix, H x (or Hᵀ x), in float32 at least; the dtype of `x` comes back."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    factors = _factors_on(width, x.device, dtype)
    y = x.to(dtype).reshape(-1, *(len(factor) for factor in factors))
    for axis, factor in enumerate(factors, start=1):
        moved = y.movedim(axis, -1)
        y = (moved @ (factor if inverse else factor.T)).movedim(-1, axis)
    return y.reshape(x.shape).to(x.dtype)


def hadamard(width: int) -> Tensor:
    """The matrix itself, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for factor in hadamard_factors(width):
        matrix = torch.kron(matrix, factor)
    return matrix


def spreading_basis(width: int, generator: torch.Generator, *, centred: bool) -> Tensor:
    """Columns: a randomised Hadamard basis, D×D; where `centred`, one of the vectors without a mean, D×(D-1), float64.

    Signs are random. Of vectors without a mean the Hadamard rows without a mean are used: the first one is constant.
    """
    kept = width - int(centred)
    signs_K = torch.randint(0, 2, (kept,), generator=generator).double() * 2 - 1
    if not centred:
        return signs_K[:, None] * hadamard(width)
    frame_KD = zero_mean_frame(width)
    # what `_placed` (model/narrow.py) does with the K dimensions is undone here, so that Hadamard's rows come out
    return frame_KD.T @ (signs_K[:, None] * hadamard(width)[1:]) @ frame_KD.T


def uniform_basis(width: int, generator: torch.Generator, *, centred: bool) -> Tensor:
    """Columns: a basis uniform over all of them; where `centred`, of the vectors without a mean. Float64."""
    if not centred:
        return random_basis(width, generator)
    return zero_mean_frame(width).T @ random_basis(width - 1, generator)


@cache
def _factors_on(width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(factor.to(device, dtype) for factor in hadamard_factors(width))


def _sylvester_factors(twos: int) -> tuple[Tensor, ...]:
    """Factors of nearly equal size, none above the largest."""
    if not twos:
        return ()
    largest = _LARGEST_SYLVESTER.bit_length() - 1
    count = -(-twos // largest)
    sizes = [twos // count + (number < twos % count) for number in range(count)]
    assert sum(sizes) == twos
    return tuple(_sylvester(size) for size in sizes)


def _sylvester(twos: int) -> Tensor:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for _ in range(twos):
        matrix = torch.kron(matrix, two)
    flat: Tensor = matrix / len(matrix) ** 0.5
    return flat


def _paley(order: int) -> Tensor | None:
    """A Hadamard matrix from the squares modulo a prime; None where neither of the two constructions has one."""
    if order % 4 == 0 and _is_prime(order - 1):  # a prime that is 3 modulo 4
        matrix = torch.ones(order, order, dtype=torch.float64, device="cpu")
        matrix[1:, 0] = -1
        matrix[1:, 1:] = _squares(order - 1) + torch.eye(order - 1, dtype=torch.float64, device="cpu")
        return matrix.div_(order**0.5)
    prime = order // 2 - 1
    if order % 4 or prime % 4 != 1 or not _is_prime(prime):
        return None
    conference = torch.ones(prime + 1, prime + 1, dtype=torch.float64, device="cpu")
    conference[0, 0] = 0
    conference[1:, 1:] = _squares(prime)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
    turned = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64, device="cpu")
    matrix = torch.kron(conference, two) + torch.kron(torch.eye(prime + 1, dtype=torch.float64, device="cpu"), turned)
    return matrix.mul(matrix[0].clone()).div_(order**0.5)


def _squares(prime: int) -> Tensor:
    """Entry (i, j): 1 where j - i is a square modulo the prime, -1 where it is none, 0 on the diagonal."""
    numbers = torch.arange(prime, device="cpu")
    character = torch.full((prime,), -1.0, dtype=torch.float64, device="cpu")
    character[numbers.square() % prime] = 1.0
    character[0] = 0.0
    return character[(numbers[None] - numbers[:, None]) % prime]


def _hartley(size: int) -> Tensor:
    """cos + sin of 2π i j / size: symmetric, orthogonal, its first row constant."""
    numbers = torch.arange(size, dtype=torch.float64, device="cpu")
    angles = torch.outer(numbers, numbers).remainder(size) * (2 * torch.pi / size)
    return (angles.cos() + angles.sin()).div_(size**0.5)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
