"""Tucker decomposition against projections by plain singular value decompositions."""

import numpy as np
import pytest
import torch
from torch import Tensor

from llmcompress.numerics.tucker import (
    Tucker,
    higher_order_iteration,
    higher_order_svd,
    tucker_parameters,
    tucker_ranks,
)
from tests.reference import tensor_train as reference

SHAPES = [((3, 4, 5), (2, 3, 2)), ((1, 7, 6), (1, 3, 4)), ((5, 5, 5), (1, 1, 1)), ((2, 11, 3), (2, 5, 3))]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(found: Tucker, tensor: Tensor) -> float:
    return float((found.compose() - tensor).norm())


@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
def test_the_higher_order_svd_equals_the_textbook(shape: tuple[int, ...], ranks: tuple[int, int, int]) -> None:
    tensor = random(*shape)
    expected = reference.higher_order_svd(tensor.numpy(), ranks)
    np.testing.assert_allclose(higher_order_svd(tensor, ranks).compose().numpy(), expected, atol=1e-9)


@pytest.mark.parametrize(("shape", "ranks"), SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_iterating_is_never_worse_than_the_higher_order_svd(
    shape: tuple[int, ...], ranks: tuple[int, int, int], seed: int
) -> None:
    tensor = random(*shape, seed=seed)
    assert error(higher_order_iteration(tensor, ranks), tensor) <= error(higher_order_svd(tensor, ranks), tensor) + 1e-9


@pytest.mark.parametrize(("shape", "_"), SHAPES)
def test_at_full_ranks_it_is_exact(shape: tuple[int, int, int], _: object) -> None:
    tensor = random(*shape)
    torch.testing.assert_close(higher_order_iteration(tensor, shape).compose(), tensor, atol=1e-10, rtol=0)


@pytest.mark.parametrize("parameters", [20, 60, 120, 200, 100_000])
def test_ranks_fit_the_budget(parameters: int) -> None:
    tensor = random(4, 6, 10)
    ranks = tucker_ranks(tensor, parameters)
    assert ranks is None or tucker_parameters(tensor.shape, ranks) <= parameters
    if parameters < tucker_parameters(tensor.shape, (1, 1, 1)):
        assert ranks is None
    if parameters == 100_000:
        assert ranks == (4, 6, 10)
