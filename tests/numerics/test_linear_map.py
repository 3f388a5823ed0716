from __future__ import annotations

import pytest
import torch

from llmcompress.numerics.linear_map import LinearMap

CPU = torch.device("cpu")


def pairs(states: int, width: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(states, width, generator=generator)
    return x_ND, torch.randn(states, outputs, generator=generator) + x_ND[:, :1]


@pytest.mark.parametrize(("states", "width", "outputs"), [(40, 7, 3), (30, 1, 1), (50, 13, 13)])
@pytest.mark.parametrize("ridge", [0.001, 0.3])
def test_batches_give_the_weighted_ridge_regression_of_all_states(states, width, outputs, ridge) -> None:
    x_ND, y_NO = pairs(states, width, outputs)
    fitted = LinearMap(width, outputs, CPU)
    for x, y in zip(x_ND.split(9), y_NO.split(9), strict=True):
        fitted.add(x, y)
    start_IO = torch.randn(width + 1, outputs, generator=torch.Generator().manual_seed(1))
    # the slow way: one stacked least squares, the pull as further rows
    x = torch.cat([x_ND, torch.ones(states, 1)], 1).double()
    root = y_NO.double().square().mean(1).rsqrt()[:, None]
    pull = (ridge * ((x * root).T @ (x * root)).diagonal().mean()).sqrt()
    rows = torch.cat([x * root, pull * torch.eye(width + 1, dtype=torch.float64)])
    targets = torch.cat([y_NO.double() * root, pull * start_IO.double()])
    torch.testing.assert_close(
        fitted.solve(start_IO, ridge), torch.linalg.lstsq(rows, targets).solution, atol=1e-4, rtol=1e-4
    )


def test_an_exact_relation_is_found_and_an_endless_pull_keeps_the_start() -> None:
    x_ND, _ = pairs(60, 5, 5)
    map_DD, shift_D = torch.randn(5, 5, generator=torch.Generator().manual_seed(2)), torch.arange(5.0)
    fitted = LinearMap(5, 5, CPU)
    fitted.add(x_ND, x_ND @ map_DD + shift_D, torch.ones(60))
    found = fitted.solve(torch.zeros(6, 5), 1e-12)
    torch.testing.assert_close(found, torch.cat([map_DD, shift_D[None]]).double(), atol=1e-4, rtol=1e-4)
    start = torch.eye(6)[:, :5]
    torch.testing.assert_close(fitted.solve(start, 1e12), start.double(), atol=1e-6, rtol=0)
