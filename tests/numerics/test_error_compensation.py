"""Weights that make up for damaged inputs, against the textbook's normal equations."""

from __future__ import annotations

import pytest
import torch

from llmcompress.numerics.error_compensation import Drift, compensated


def problem(tokens: int = 200, inputs: int = 12, outputs: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(tokens, inputs, generator=generator)
    damaged = dense + 0.3 * torch.randn(tokens, inputs, generator=generator) @ torch.randn(
        inputs, inputs, generator=generator
    )
    return dense, damaged, torch.randn(outputs, inputs, generator=generator)


def drift_of(dense: torch.Tensor, damaged: torch.Tensor) -> Drift:
    drift = Drift(dense.shape[1], torch.device("cpu"))
    for start in range(0, len(dense), 64):
        drift.add(dense[start : start + 64], damaged[start : start + 64])
    return drift


def test_full_strength_is_the_least_squares_solution() -> None:
    dense, damaged, weight = problem()
    (found,) = compensated([weight], drift_of(dense, damaged), strength=1.0, damping=1e-9)
    wanted = torch.linalg.lstsq(damaged, dense @ weight.T).solution.T
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("damping", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_outputs_come_nearer_and_zeros_stay(strength: float, damping: float) -> None:
    dense, damaged, weight = problem()
    other = weight.flip(0).masked_fill(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.3, 0.0)
    found = compensated([weight, other], drift_of(dense, damaged), strength=strength, damping=damping)
    assert ((found[1] == 0) == (other == 0)).all()

    def error(moved: torch.Tensor, was: torch.Tensor) -> float:
        return float((damaged @ moved.T - dense @ was.T).square().sum())

    assert error(found[0], weight) < error(weight, weight)


def test_undamaged_and_unseen_inputs_change_nothing() -> None:
    dense, _, weight = problem()
    for drift in (drift_of(dense, dense), Drift(dense.shape[1], torch.device("cpu"))):
        assert torch.equal(compensated([weight], drift, strength=1.0, damping=0.1)[0], weight)
