"""Small linear models against textbook conditions and formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcompress.numerics.regression import fit_by_rank, kendall_tau, lasso, lasso_order, quadratic_lasso, ridge


def problem(examples: int, features: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, features, dtype=torch.float64, generator=generator)
    y = x[:, 0] - 2 * x[:, -1] + 0.1 * torch.randn(examples, dtype=torch.float64, generator=generator)
    return x, y


@pytest.mark.parametrize("shape", [(30, 4), (5, 20), (1, 1)], ids=str)
@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_ridge_solves_its_normal_equations(shape: tuple[int, int], strength: float) -> None:
    x, y = problem(*shape)
    weights = ridge(x, y, strength)
    residual = x.T @ (x @ weights - y) + strength * shape[0] * weights
    torch.testing.assert_close(residual, torch.zeros_like(residual), atol=1e-8, rtol=0)


@pytest.mark.parametrize("shape", [(40, 6), (12, 20)], ids=str)
def test_lasso_satisfies_its_optimality_conditions(shape: tuple[int, int]) -> None:
    x, y = problem(*shape)
    penalty = 0.05 * shape[0]
    weights = lasso(x, y, 0.05, iterations=3000)
    slope = x.T @ (y - x @ weights)
    used = weights != 0
    torch.testing.assert_close(slope[used], penalty * weights[used].sign(), atol=1e-4, rtol=1e-4)
    assert (slope[~used].abs() <= penalty * (1 + 1e-6)).all()
    assert used[0] and used[-1] and not used.all()


def test_a_penalty_above_the_largest_slope_leaves_nothing() -> None:
    x, y = problem(30, 5)
    products, target = x.T @ x, x.T @ y
    assert not quadratic_lasso(products, target, float(target.abs().max()) * 1.001).any()


def test_the_lasso_order_puts_what_makes_the_output_first_and_dead_units_last() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(60, 5, dtype=torch.float64, generator=generator) * torch.tensor([5.0, 0.1, 3.0, 1.0, 0.0])
    order = lasso_order(outputs.T @ outputs).argsort(descending=True).tolist()
    assert order[:2] == [0, 2] and order[-1] == 4


def test_the_lasso_order_prefers_one_of_two_twins_over_both() -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(80, 3, dtype=torch.float64, generator=generator)
    outputs = torch.stack([base[:, 0] * 2, base[:, 0] * 2.001, base[:, 1], base[:, 2]], 1)
    importance = lasso_order(outputs.T @ outputs)
    assert importance[[0, 1]].max() == importance.max() and len(importance.unique()) == 4


@pytest.mark.parametrize("seed", range(3))
def test_kendall_tau_equals_the_count_of_pairs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 6, (15,), generator=generator).double()
    b = torch.randint(0, 6, (15,), generator=generator).double()
    pairs = [(i, j) for i in range(15) for j in range(i)]
    agree = sum(float(torch.sign((a[i] - a[j]) * (b[i] - b[j]))) for i, j in pairs)
    untied = [sum(float(each[i] != each[j]) for i, j in pairs) for each in (a, b)]
    assert kendall_tau(a, b) == pytest.approx(agree / (untied[0] * untied[1]) ** 0.5)
    assert kendall_tau(a, a) == pytest.approx(1) and kendall_tau(a, torch.ones(15)) == 0


def test_the_fit_chosen_by_rank_finds_which_features_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    half = (torch.rand(40, 12, generator=generator) < 0.5).double()
    masks = torch.stack([half, 1 - half], 1).flatten(0, 1)
    truth = torch.tensor([4.0, -3.0, 2.0] + [0.0] * 9, dtype=torch.float64)
    y = masks @ truth + 0.2 * torch.randn(80, dtype=torch.float64, generator=generator)
    found = fit_by_rank(masks, y)
    assert found.tau > 0.8
    torch.testing.assert_close(found.weights_F, truth, atol=0.3, rtol=0)


def test_pure_noise_has_no_rank_to_find() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(60, 8, generator=generator) < 0.5).double()
    assert fit_by_rank(masks, torch.rand(60, generator=generator).double()).tau < 0.35
