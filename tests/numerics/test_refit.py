"""Refits against least squares on the inputs themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcompress.numerics.importance import output_products
from llmcompress.numerics.refit import deleted, refit_bias, refit_columns, refit_scales

SHAPES = [(1, 2), (5, 7), (3, 16), (8, 33)]


def problem(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs with a mean (tokens × inputs), and which inputs stay."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, dtype=torch.float64, generator=generator)
    mix = torch.randn(inputs, inputs, dtype=torch.float64, generator=generator)
    x = torch.randn(4 * inputs + 9, inputs, dtype=torch.float64, generator=generator) @ mix + 1.5
    kept = torch.rand(inputs, generator=generator) < 0.6
    kept[0], kept[-1] = True, False
    return weight, x, kept


def error(new: Tensor, weight: Tensor, x: Tensor, bias: Tensor | None = None) -> float:
    change = x @ (new - weight).T + (0 if bias is None else bias)
    return float(change.square().sum() / (x @ weight.T).square().sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_little_damping_columns_are_the_least_squares_solution(shape: tuple[int, int]) -> None:
    weight, x, kept = problem(*shape)
    found = refit_columns(weight, x.T @ x, kept, damping=1e-12)
    expected = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    torch.testing.assert_close(found.weight_OI[:, kept], expected, atol=1e-5, rtol=1e-5)
    assert not found.weight_OI[:, ~kept].any()
    assert found.error == pytest.approx(error(found.weight_OI, weight, x), rel=1e-6)
    assert found.error_deleted == pytest.approx(error(weight * kept, weight, x), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_a_bias_the_solution_is_that_of_least_squares_with_a_constant(shape: tuple[int, int]) -> None:
    weight, x, kept = problem(*shape)
    found = refit_columns(weight, x.T @ x, kept, damping=1e-12, mean_I=x.mean(0), tokens=len(x))
    ones = torch.ones(len(x), 1, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([x[:, kept], ones], 1), x @ weight.T).solution.T
    assert found.bias_O is not None
    torch.testing.assert_close(found.weight_OI[:, kept], expected[:, :-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.bias_O, expected[:, -1], atol=1e-4, rtol=1e-4)
    assert found.error == pytest.approx(error(found.weight_OI, weight, x, found.bias_O), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_refit_is_worse_than_deleting_and_columns_are_never_worse_than_scales(
    shape: tuple[int, int], damping: float
) -> None:
    weight, x, kept = problem(*shape)
    gram, owner = x.T @ x, torch.arange(shape[1])
    products = output_products(weight, gram, owner, shape[1])
    scales = refit_scales(weight, gram, kept, products, owner, damping=damping)
    columns = refit_columns(weight, gram, kept, damping=damping)
    bias = refit_bias(weight, gram, kept, mean_I=x.mean(0), tokens=len(x))
    plain = deleted(weight, gram, kept)
    for each in (scales, columns, bias):
        assert each.error is not None and plain.error is not None and each.error <= plain.error * (1 + 1e-12)
    if damping < 1e-5:
        assert columns.error is not None and scales.error is not None and columns.error <= scales.error + 1e-9


def test_scales_are_least_squares_over_units() -> None:
    weight, x, _ = problem(4, 9)
    owner = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    kept = owner != 1
    gram = x.T @ x
    found = refit_scales(weight, gram, kept, output_products(weight, gram, owner, 3), owner, damping=1e-12)
    added = torch.stack([(x[:, owner == u] @ weight[:, owner == u].T).flatten() for u in (0, 2)], 1)
    factors = torch.linalg.lstsq(added, (x @ weight.T).flatten()[:, None]).solution.flatten()
    torch.testing.assert_close(found.weight_OI[:, :3], weight[:, :3] * factors[0])
    torch.testing.assert_close(found.weight_OI[:, 6:], weight[:, 6:] * factors[1])
    assert not found.weight_OI[:, 3:6].any()


def test_scales_above_ten_are_not_used() -> None:
    """The kept unit is a hundredth of the removed one."""
    weight, x = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 100.0], [2.0, 200.0]])
    gram, owner, kept = x.T @ x, torch.arange(2), torch.tensor([True, False])
    found = refit_scales(weight, gram, kept, output_products(weight, gram, owner, 2), owner, damping=1e-9)
    assert found.degraded is not None and "above 10" in found.degraded
    assert found.weight_OI.tolist() == [[1.0, 0.0]]


def test_a_bias_takes_over_exactly_what_never_varies() -> None:
    weight, x, kept = problem(3, 8)
    x[:, ~kept] = x[0, ~kept]
    found = refit_bias(weight, x.T @ x, kept, mean_I=x.mean(0), tokens=len(x))
    assert found.error == pytest.approx(0, abs=1e-12)


def test_zeros_stay_zero_and_duplicates_are_taken_over_entirely() -> None:
    weight, x, _ = problem(4, 6)
    x[:, 5] = 2 * x[:, 1]
    kept = torch.tensor([True, True, True, True, True, False])
    found = refit_columns(weight, x.T @ x, kept, damping=1e-10)
    torch.testing.assert_close(found.weight_OI[:, 1], weight[:, 1] + 2 * weight[:, 5], atol=1e-4, rtol=1e-4)
    weight[0, 1] = weight[2, 3] = 0
    sparse = refit_columns(weight, x.T @ x, kept, damping=1e-10)
    assert sparse.weight_OI[0, 1] == 0 and sparse.weight_OI[2, 3] == 0
    assert sparse.error is not None and sparse.error_deleted is not None and sparse.error <= sparse.error_deleted


def test_without_any_input_the_columns_are_only_deleted_and_it_is_said() -> None:
    weight, _, kept = problem(3, 8)
    found = refit_columns(weight, torch.zeros(8, 8, dtype=torch.float64), kept, damping=0.01)
    assert torch.equal(found.weight_OI, weight * kept)
    assert found.error == 0 and found.degraded == "its inputs were always zero: not refitted"


def test_keeping_everything_changes_nothing() -> None:
    weight, x, _ = problem(3, 8)
    found = refit_columns(weight, x.T @ x, torch.ones(8, dtype=torch.bool), damping=0.01)
    assert torch.equal(found.weight_OI, weight) and found.error == 0
