"""Weights that make up for what their inputs lost, against the least squares they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcompress.numerics.error_compensation import LOUD, Drift, compensated

OUTPUTS, INPUTS = 7, 12


def tokens(count: int = 400, *, lost: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs of the dense model, and what became of them: partly a linear loss, which weights can make up for."""
    random = torch.Generator().manual_seed(seed)
    dense_TI = torch.randn(count, INPUTS, generator=random)
    mixing_II = torch.eye(INPUTS) + lost * torch.randn(INPUTS, INPUTS, generator=random) / INPUTS**0.5
    return dense_TI, dense_TI @ mixing_II + 0.05 * torch.randn(count, INPUTS, generator=random)


def weight() -> Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(9))


def moved(pairs: list[tuple[Tensor, Tensor]], *, strength: float = 1.0, damping: float = 1e-6) -> Tensor:
    drift = Drift(INPUTS, torch.device("cpu"))
    for dense_TI, x_TI in pairs:
        drift.add(dense_TI, x_TI)
    return compensated([weight()], drift, strength=strength, damping=damping)[0]


def error(weight_OI: Tensor, dense_TI: Tensor, x_TI: Tensor) -> float:
    return float((x_TI @ weight_OI.T - dense_TI @ weight().T).square().sum())


def test_what_linear_maps_lost_comes_back_nearly_as_far_as_least_squares_can() -> None:
    dense_TI, x_TI = tokens(4000)
    wanted_OI = torch.linalg.lstsq(x_TI, dense_TI @ weight().T).solution.T
    found_OI = moved([(dense_TI, x_TI)])
    assert error(found_OI, dense_TI, x_TI) < 1.02 * error(wanted_OI, dense_TI, x_TI)
    assert error(found_OI, dense_TI, x_TI) < 0.1 * error(weight(), dense_TI, x_TI)


@pytest.mark.parametrize("strength", [0.1, 0.3, 1.0])
def test_what_was_fitted_to_noise_does_next_to_no_harm_on_other_tokens(strength: float) -> None:
    """Two tokens for every input: most of any fit is one to noise, and does harm elsewhere."""

    def noisy(count: int, seed: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(seed)
        dense_TI = torch.randn(count, INPUTS, generator=random)
        return dense_TI, dense_TI + 0.3 * torch.randn(dense_TI.shape, generator=random)

    fresh = noisy(2000, seed=5)
    assert error(moved([noisy(2 * INPUTS, seed=1)], strength=strength), *fresh) < 1.1 * error(weight(), *fresh)


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_a_thousandfold_token_does_not_decide_for_the_others(strength: float) -> None:
    dense_TI, x_TI = tokens(400)
    dense_TI[0], x_TI[0] = 1000.0, 1000.0 * torch.linspace(-1, 3, INPUTS)
    others = slice(1, None)
    found_OI = moved([(dense_TI, x_TI)], strength=strength)
    assert error(found_OI, dense_TI[others], x_TI[others]) < error(weight(), dense_TI[others], x_TI[others])


def test_loud_tokens_weigh_as_much_as_the_limit_and_all_others_fully() -> None:
    dense_TI, x_TI = tokens(10)
    dense_TI[3] *= 50
    drift = Drift(INPUTS, torch.device("cpu"))
    drift.add(dense_TI, x_TI)
    loudness = dense_TI.square().sum(1)
    wanted = sum(
        min(1.0, LOUD * float(loudness.median()) / float(loud)) * torch.outer(x_I, x_I)
        for loud, x_I in zip(loudness, x_TI, strict=True)
    )
    torch.testing.assert_close(drift.halves[0].gram_II + drift.halves[1].gram_II, wanted)


def test_zeros_stay_and_nothing_moves_where_nothing_was_lost_or_seen() -> None:
    dense_TI, _ = tokens()
    assert torch.equal(moved([(dense_TI, dense_TI)]), weight())
    assert torch.equal(moved([]), weight())
    drift = Drift(INPUTS, torch.device("cpu"))
    drift.add(*tokens())
    sparse_OI = weight().masked_fill(weight() < 0, 0.0)
    (found_OI,) = compensated([sparse_OI], drift, strength=1.0, damping=0.1)
    assert torch.equal(found_OI == 0, sparse_OI == 0) and not torch.equal(found_OI, sparse_OI)
