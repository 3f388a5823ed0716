"""MoDeGPT's decompositions against the textbook."""

import numpy as np
import pytest
import torch
from torch import Tensor

from llmcompress.numerics.low_rank import best_left
from llmcompress.numerics.modular import allocate, coupling, nystrom_channels, row_energy, value_basis
from llmcompress.numerics.refit import refit_columns


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(channels: int, tokens: int = 200, seed: int = 0) -> Tensor:
    x_TC = random(tokens, channels, seed=seed) @ random(channels, channels, seed=seed + 1)
    return x_TC.T @ x_TC


@pytest.mark.parametrize(("channels", "keep"), [(7, 3), (13, 12), (32, 8), (2, 1), (5, 5)])
def test_kept_channels_have_the_highest_ridge_leverage(channels: int, keep: int) -> None:
    gram_CC = gram(channels)
    ridge = 0.01 * float(gram_CC.diagonal().mean())
    leverage = np.diag(gram_CC.numpy() @ np.linalg.inv(gram_CC.numpy() + ridge * np.eye(channels)))
    expected = set(np.argsort(-leverage)[:keep])
    assert set(nystrom_channels(gram_CC, keep, ridge=0.01).nonzero().flatten().tolist()) == expected


def test_channels_that_were_always_zero_go_first() -> None:
    gram_CC = gram(6)
    gram_CC[[1, 4]] = 0
    gram_CC[:, [1, 4]] = 0
    assert nystrom_channels(gram_CC, 4, ridge=1e-3).tolist() == [True, False, True, True, False, True]
    assert int(nystrom_channels(torch.zeros(5, 5), 2, ridge=1e-3).sum()) == 2


@pytest.mark.parametrize("seed", range(5))
def test_the_nystrom_error_is_at_most_that_of_plain_deletion(seed: int) -> None:
    gram_CC, weight_OC = gram(24, seed=seed), random(9, 24, seed=seed + 10)
    new = refit_columns(weight_OC, gram_CC, nystrom_channels(gram_CC, 15, ridge=0.01), damping=0.01)
    assert new.error < new.error_deleted


def test_row_energy_is_the_mean_square_of_the_outputs() -> None:
    x_TI, weight_KI, bias_K = random(50, 7) + 1, random(4, 7, seed=1), random(4, seed=2)
    energy_K = row_energy(weight_KI, bias_K, x_TI.T @ x_TI, x_TI.mean(0), 50)
    torch.testing.assert_close(energy_K, (x_TI @ weight_KI.T + bias_K).square().mean(0))


def test_coupling_is_that_of_the_paper_for_one_pair_and_several_heads() -> None:
    queries, key = random(3, 40, 2), random(40, 2, seed=1)
    found = coupling(queries.square().sum(2).mean(1), key.square().sum(1).mean())
    expected = sum(
        np.linalg.norm(q.numpy() / np.sqrt(40)) ** 2 * np.linalg.norm(key.numpy() / np.sqrt(40)) ** 2 for q in queries
    )
    assert float(found) == pytest.approx(np.sqrt(expected))


@pytest.mark.parametrize("rank", [1, 2, 5, 8])
def test_with_one_query_head_value_and_output_are_the_best_of_their_rank(rank: int) -> None:
    reader_OV, gram_VV = random(11, 8), gram(8)
    basis_KV = value_basis([reader_OV], [gram_VV], rank)
    product_OV = best_left(reader_OV, basis_KV, gram_VV) @ basis_KV
    root = np.linalg.cholesky(gram_VV.numpy())
    values = np.linalg.svd(reader_OV.numpy() @ root, compute_uv=False)
    found = np.linalg.norm((reader_OV - product_OV).numpy() @ root)
    assert found == pytest.approx(np.sqrt((values[rank:] ** 2).sum()), abs=1e-8 * values[0])
    torch.testing.assert_close(basis_KV @ basis_KV.T, torch.eye(rank, dtype=torch.float64), atol=1e-10, rtol=0)


def test_heads_that_share_values_share_a_basis_no_worse_than_a_random_one() -> None:
    readers, grams = [random(9, 6, seed=s) for s in range(3)], [gram(6, seed=s) for s in range(3)]

    def error(basis_KV: Tensor) -> float:
        lost = 0.0
        for reader_OV, gram_VV in zip(readers, grams, strict=True):
            change = reader_OV - best_left(reader_OV, basis_KV, gram_VV) @ basis_KV
            lost += float(((change @ gram_VV) * change).sum())
        return lost

    ours = error(value_basis(readers, grams, 3))
    others = [error(torch.linalg.qr(random(6, 3, seed=s))[0].T) for s in range(20)]
    assert ours < min(others)
    assert error(value_basis(readers, grams, 6)) < 1e-9


def test_values_that_are_never_seen_cost_nothing() -> None:
    gram_VV = torch.zeros(4, 4, dtype=torch.float64)
    gram_VV[0, 0] = 3.0
    basis_KV = value_basis([random(5, 4)], [gram_VV], 2)
    assert basis_KV[0].abs()[0] == pytest.approx(1.0) and torch.isfinite(basis_KV).all()


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.6])
def test_shares_add_up_and_none_is_above_its_limit(fraction: float, temperature: float) -> None:
    influence, sizes = torch.tensor([0.9, 0.2, 0.1, 0.3]), torch.tensor([10.0, 20.0, 20.0, 30.0])
    most = torch.tensor([0.5, 0.9, 0.7, 0.8])
    shares = allocate(influence, sizes, most, fraction=fraction, temperature=temperature)
    assert float((shares * sizes).sum()) == pytest.approx(fraction * 80)
    assert (shares <= most.double() + 1e-12).all() and (shares >= 0).all()
    free = shares < most.double() - 1e-9
    order = influence[free].argsort()
    assert (shares[free][order].diff() <= 1e-12).all(), "a block with more influence loses no more"


def test_a_high_temperature_is_uniform_and_the_formula_holds_where_nothing_is_clipped() -> None:
    influence, ones = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64), torch.ones(3)
    torch.testing.assert_close(
        allocate(influence, ones, ones, fraction=0.25, temperature=1e9), torch.full((3,), 0.25, dtype=torch.float64)
    )
    expected = 3 * 0.25 * torch.softmax(-influence / 0.2, 0)
    torch.testing.assert_close(allocate(influence, ones, ones, fraction=0.25, temperature=0.2), expected)
