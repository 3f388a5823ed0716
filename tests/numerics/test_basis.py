"""Bases are orthonormal and mean what they say; the refit is a least squares fit."""

from __future__ import annotations

import pytest
import torch

from llmcompress.numerics.basis import (
    SecondMoment,
    mirror_normal,
    principal_basis,
    random_basis,
    refitted,
    reflected,
    zero_mean_frame,
)

WIDTHS = [1, 2, 7, 16]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(count: int, width: int, seed: int = 0) -> torch.Tensor:
    mixed = torch.randn(width, width, generator=seeded(seed + 1), dtype=torch.float64)
    return torch.randn(count, width, generator=seeded(seed), dtype=torch.float64) @ mixed


@pytest.mark.parametrize("width", WIDTHS)
def test_principal_directions_are_those_of_the_data_by_falling_energy(width):
    x_TD = tokens(40, width)
    basis_DD = principal_basis(x_TD.T @ x_TD)
    _, singular, vectors = torch.linalg.svd(x_TD, full_matrices=False)
    torch.testing.assert_close((x_TD @ basis_DD).square().sum(0), singular.square(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((vectors @ basis_DD).abs(), torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("width", WIDTHS)
def test_random_bases_are_orthonormal_and_follow_the_seed(width):
    basis_DD = random_basis(width, seeded(3))
    torch.testing.assert_close(basis_DD.T @ basis_DD, torch.eye(width, dtype=torch.float64))
    assert torch.equal(basis_DD, random_basis(width, seeded(3)))


def test_random_bases_have_no_preferred_sign():
    first = torch.stack([random_basis(3, seeded(seed))[0, 0] for seed in range(200)])
    assert abs(float(first.mean())) < 0.15


@pytest.mark.parametrize("width", [2, 3, 8, 33])
def test_a_frame_without_a_mean_is_orthonormal_and_complete(width):
    frame = zero_mean_frame(width)
    assert frame.shape == (width - 1, width)
    torch.testing.assert_close(frame @ frame.T, torch.eye(width - 1, dtype=torch.float64))
    torch.testing.assert_close(frame.sum(1), torch.zeros(width - 1, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 9])
def test_a_mirror_keeps_lengths_and_the_direction_of_all_ones(width):
    normal = mirror_normal(width, seeded())
    x = tokens(5, width)
    mirrored = reflected(x, normal)
    torch.testing.assert_close(mirrored @ mirrored.T, x @ x.T)
    torch.testing.assert_close(reflected(mirrored, normal), x)
    ones = torch.ones(1, width, dtype=torch.float64)
    torch.testing.assert_close(reflected(ones, normal), ones)
    assert width == 1 or not torch.allclose(mirrored, x)


def test_second_moments_are_of_unit_tokens_and_an_empty_token_adds_nothing():
    x_TD = tokens(6, 5).float()
    x_TD[2] = 0
    found = SecondMoment(5, torch.device("cpu"))
    found.add(x_TD[:4])
    found.add(x_TD[4:])
    slow = torch.zeros(5, 5, dtype=torch.float64)
    for row in x_TD.double():
        if row.any():
            slow += torch.outer(row, row) * 5 / row.square().sum()
    torch.testing.assert_close(found.sum_DD, slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [1, 4, 7])
def test_the_refit_is_damped_least_squares(kept):
    x_TD, weight_OD = tokens(50, 7), tokens(3, 7, seed=5)
    moment_DD, kept_DK = x_TD.T @ x_TD, random_basis(7, seeded(2))[:, :kept]
    damping = 0.05
    found_OK = weight_OD @ refitted(moment_DD, kept_DK, damping=damping)
    seen_TK = x_TD @ kept_DK
    extra = (damping * seen_TK.square().sum(0).mean()) ** 0.5
    # rows that pull towards the kept part of the weight
    inputs = torch.cat([seen_TK, extra * torch.eye(kept, dtype=torch.float64)])
    targets = torch.cat([x_TD @ weight_OD.T, extra * (weight_OD @ kept_DK).T])
    torch.testing.assert_close(found_OK, torch.linalg.lstsq(inputs, targets).solution.T)


def test_the_refit_changes_nothing_where_nothing_is_lost_or_seen():
    moment_DD = tokens(30, 6).T @ tokens(30, 6)
    everything = random_basis(6, seeded())
    torch.testing.assert_close(refitted(moment_DD, everything, damping=0.01), everything)
    principal = principal_basis(moment_DD)[:, :4]
    torch.testing.assert_close(refitted(moment_DD, principal, damping=0.01), principal)
    assert torch.equal(refitted(torch.zeros(6, 6), principal, damping=0.01), principal)
