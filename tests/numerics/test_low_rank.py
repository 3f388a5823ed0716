"""Low-rank factors against SVD-LLM by the book, on plain data in float64."""

import pytest
import torch
from torch import Tensor

from llmcompress.numerics.low_rank import (
    best_left,
    best_right,
    break_even,
    leading_factors,
    output_spectrum,
    truncate,
)
from tests.reference.low_rank import least_squares, whitened_svd

SHAPES = [(1, 1), (1, 7), (5, 1), (13, 31), (31, 13), (8, 8), (7, 43), (97, 3)]


def problem(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix_II = torch.randn(inputs, inputs, dtype=torch.float64, generator=generator)
    x_TI = torch.randn(4 * inputs + 5, inputs, dtype=torch.float64, generator=generator) @ mix_II
    return torch.randn(outputs, inputs, dtype=torch.float64, generator=generator), x_TI


def ranks(shape: tuple[int, int]) -> list[int]:
    return sorted({1, (min(shape) + 1) // 2, min(shape)})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truncation_equals_svd_llm(shape: tuple[int, int]) -> None:
    weight_OI, x_TI = problem(*shape)
    gram_II = x_TI.T @ x_TI
    spectrum = output_spectrum(weight_OI, gram_II)
    for rank in ranks(shape):
        expected_OI, sigma_K = whitened_svd(weight_OI, gram_II, rank)
        torch.testing.assert_close(spectrum.energy_K, sigma_K.square(), rtol=1e-7, atol=1e-9 * float(sigma_K[0]) ** 2)
        torch.testing.assert_close(truncate(weight_OI, spectrum, rank).product(), expected_OI, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_of_the_outputs_is_the_discarded_energy(shape: tuple[int, int]) -> None:
    weight_OI, x_TI = problem(*shape, seed=1)
    spectrum = output_spectrum(weight_OI, x_TI.T @ x_TI)
    whole = float((x_TI @ weight_OI.T).square().sum())
    for rank in ranks(shape):
        difference_OI = truncate(weight_OI, spectrum, rank).product() - weight_OI
        found = float((x_TI @ difference_OI.T).square().sum())
        assert abs(found - spectrum.discarded(rank)) < 1e-6 * whole
        assert abs(found / whole - spectrum.lost(rank)) < 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_metric_it_is_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    weight_OI, _ = problem(*shape, seed=2)
    left_OK, sigma_K, right_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    spectrum = output_spectrum(weight_OI, None)
    for rank in ranks(shape):
        expected_OI = left_OK[:, :rank] * sigma_K[:rank] @ right_KI[:rank]
        torch.testing.assert_close(truncate(weight_OI, spectrum, rank).product(), expected_OI, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_vector_is_a_diagonal_metric(shape: tuple[int, int]) -> None:
    weight_OI, x_TI = problem(*shape, seed=3)
    metric_I = x_TI.abs().mean(0)
    narrow, wide = output_spectrum(weight_OI, metric_I), output_spectrum(weight_OI, torch.diag(metric_I))
    torch.testing.assert_close(narrow.energy_K, wide.energy_K, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("metric", ["none", "few tokens", "dead channels"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_rank_is_the_weight_even_where_the_metric_has_no_inverse(shape: tuple[int, int], metric: str) -> None:
    weight_OI, x_TI = problem(*shape, seed=4)
    if metric == "few tokens":
        x_TI = x_TI[:2]
    if metric == "dead channels":
        x_TI[:, ::2] = 0
    spectrum = output_spectrum(weight_OI, None if metric == "none" else x_TI.T @ x_TI)
    full = truncate(weight_OI, spectrum, min(shape)).product()
    torch.testing.assert_close(full, weight_OI, rtol=1e-10, atol=1e-11)
    assert spectrum.lost(min(shape)) == 0


def test_with_the_gram_matrix_the_outputs_lose_less_than_without() -> None:
    weight_OI, x_TI = problem(24, 32, seed=5)
    gram_II = x_TI.T @ x_TI
    errors = []
    for metric in (gram_II, gram_II.diagonal(), None):
        difference_OI = truncate(weight_OI, output_spectrum(weight_OI, metric), 6).product() - weight_OI
        errors.append(float((x_TI @ difference_OI.T).square().sum()))
    assert errors[0] < min(errors[1:])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_best_left_factor_is_the_least_squares_solution(shape: tuple[int, int]) -> None:
    weight_OI, x_TI = problem(*shape, seed=6)
    generator = torch.Generator().manual_seed(0)
    right_RI = torch.randn(max(1, min(shape) // 2), shape[1], dtype=torch.float64, generator=generator)
    expected_OR = least_squares(x_TI @ right_RI.T, x_TI @ weight_OI.T)
    found_OR = best_left(weight_OI, right_RI, x_TI.T @ x_TI)
    torch.testing.assert_close(found_OR, expected_OR, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_best_right_factor_is_the_least_squares_solution(shape: tuple[int, int]) -> None:
    weight_OI, _ = problem(*shape, seed=7)
    generator = torch.Generator().manual_seed(1)
    left_OR = torch.randn(shape[0], max(1, min(shape) // 2), dtype=torch.float64, generator=generator)
    expected_RI = torch.linalg.lstsq(left_OR, weight_OI).solution
    torch.testing.assert_close(best_right(weight_OI, left_OR), expected_RI, rtol=1e-6, atol=1e-8)


def test_refitting_leaves_optimal_factors_alone() -> None:
    weight_OI, x_TI = problem(13, 31, seed=8)
    gram_II = x_TI.T @ x_TI
    factors = truncate(weight_OI, output_spectrum(weight_OI, gram_II), 5)
    torch.testing.assert_close(best_left(weight_OI, factors.right_RI, gram_II), factors.left_OR)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_below_break_even_factors_are_smaller_and_at_it_they_are_not(shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    rank = break_even(outputs, inputs)
    assert rank * (outputs + inputs) >= outputs * inputs > (rank - 1) * (outputs + inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leading_factors_of_small_weights_are_the_best_ones(shape: tuple[int, int]) -> None:
    weight_OI, x_TI = problem(*shape, seed=5)
    gram_II = x_TI.T @ x_TI
    for rank in (each for each in ranks(shape) if each + 8 >= min(shape)):
        best_OI = truncate(weight_OI, output_spectrum(weight_OI, gram_II), rank).product()
        for start_OR in (None, torch.eye(shape[0], rank, dtype=torch.float64)):
            found_OI = leading_factors(weight_OI, gram_II, rank, start_OR).product()
            torch.testing.assert_close(found_OI, best_OI, rtol=1e-6, atol=1e-6)


def test_leading_factors_of_large_weights_lose_hardly_more_than_the_best_ones() -> None:
    weight_OI, x_TI = problem(150, 120, seed=6)
    gram_II = x_TI.T @ x_TI
    spectrum = output_spectrum(weight_OI, gram_II)
    for rank in (4, 30, 100):
        factors = leading_factors(weight_OI, gram_II, rank)
        difference_OI = factors.product() - weight_OI
        lost = float(((difference_OI @ gram_II) * difference_OI).sum())
        assert spectrum.discarded(rank) * (1 - 1e-9) <= lost <= 1.03 * spectrum.discarded(rank)
