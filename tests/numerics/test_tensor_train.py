"""Tensor trains against their definition, on odd, prime and 1-wide shapes."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from llmcompress.numerics.tensor_train import (
    balanced_factors,
    compose,
    decompose,
    decompose_within,
    full_ranks,
    matrix_axes,
    matrix_to_tensor,
    ranks_within,
    tensor_to_matrix,
    train_parameters,
)
from tests.reference import tensor_train as reference

SHAPES = [(6,), (2, 3), (3, 5, 2), (1, 7, 1), (2, 2, 3, 2), (4, 1, 3)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("axes", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_tensor_of_a_batch_gets_the_train_of_the_textbook(axes: tuple[int, ...], rank: int) -> None:
    tensors_VD = random(4, math.prod(axes))
    found_VD = compose(decompose(tensors_VD, axes, [rank] * (len(axes) - 1)))
    for tensor_D, found_D in zip(tensors_VD.numpy(), found_VD.numpy(), strict=True):
        expected = reference.entry_by_entry(reference.train_of(tensor_D.reshape(axes), [rank] * (len(axes) - 1)))
        np.testing.assert_allclose(found_D, expected.reshape(-1), atol=1e-10)


@pytest.mark.parametrize("axes", SHAPES)
def test_at_full_ranks_it_is_exact_and_has_the_parameters_of_the_formula(axes: tuple[int, ...]) -> None:
    tensors_VD = random(3, math.prod(axes))
    cores = decompose(tensors_VD, axes, full_ranks(axes))
    torch.testing.assert_close(compose(cores), tensors_VD, atol=1e-12, rtol=0)
    assert sum(core[0].numel() for core in cores) == train_parameters(axes, full_ranks(axes))


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("axes", [(4, 5, 6), (3, 4, 2, 5), (8, 15)])
def test_the_error_stays_within_the_tolerance(axes: tuple[int, ...], tolerance: float) -> None:
    tensors_VD = random(5, math.prod(axes))
    cores = decompose_within(tensors_VD, axes, tolerance)
    assert float((compose(cores) - tensors_VD).norm()) <= tolerance * float(tensors_VD.norm()) + 1e-10


def test_the_error_falls_with_the_rank() -> None:
    tensors_VD = random(20, 60)
    errors = [float((compose(decompose(tensors_VD, (3, 4, 5), [r, r])) - tensors_VD).norm()) for r in range(1, 6)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-10


def test_a_tensor_that_is_a_short_train_is_found_again() -> None:
    cores = [random(1, 1, 4, 2), random(1, 2, 5, 2, seed=1), random(1, 2, 3, 1, seed=2)]
    tensor = compose(cores)
    found = decompose_within(tensor, (4, 5, 3), 1e-6)
    assert [core.shape[-1] for core in found] == [2, 2, 1]
    torch.testing.assert_close(compose(found), tensor, atol=1e-10, rtol=0)


@pytest.mark.parametrize("shape", [(6, 10), (7, 9), (1, 5), (12, 12), (43, 8)])
@pytest.mark.parametrize("ways", [2, 3])
def test_a_matrix_is_its_tensor_entry_by_entry(shape: tuple[int, int], ways: int) -> None:
    weight_OI = random(*shape)
    rows, columns = matrix_axes(*shape, ways)
    tensor = matrix_to_tensor(weight_OI, rows, columns)
    assert torch.equal(tensor_to_matrix(tensor, rows, columns), weight_OI)
    spread = tensor.reshape([size for pair in zip(rows, columns, strict=True) for size in pair])
    for o, i in [(0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 3)]:
        place = [
            int(index)
            for pair in zip(np.unravel_index(o, rows), np.unravel_index(i, columns), strict=True)
            for index in pair
        ]
        assert spread[tuple(place)] == weight_OI[o, i]


@pytest.mark.parametrize("parameters", [1, 40, 100, 250, 10_000])
def test_ranks_fit_the_budget_and_more_budget_is_never_worse(parameters: int) -> None:
    tensor_D, axes = random(240), (6, 8, 5)
    ranks = ranks_within(tensor_D, axes, parameters)
    least = train_parameters(axes, (1, 1))
    assert train_parameters(axes, ranks) <= max(parameters, least)
    if parameters >= train_parameters(axes, full_ranks(axes)):
        assert ranks == full_ranks(axes)


@pytest.mark.parametrize(
    ("number", "ways", "expected"),
    [(768, 3, (8, 8, 12)), (192, 3, (4, 6, 8)), (43, 2, (1, 43)), (1, 2, (1, 1)), (64, 2, (8, 8)), (42, 3, (2, 3, 7))],
)
def test_factors_are_balanced(number: int, ways: int, expected: tuple[int, ...]) -> None:
    assert balanced_factors(number, ways) == expected


def test_the_batch_is_cut_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors_VD = random(7, 24)
    whole = compose(decompose(tensors_VD, (2, 3, 4), [2, 2]))
    monkeypatch.setattr("llmcompress.numerics.tensor_train._AT_ONCE", 50)
    torch.testing.assert_close(compose(decompose(tensors_VD, (2, 3, 4), [2, 2])), whole, atol=1e-12, rtol=0)
