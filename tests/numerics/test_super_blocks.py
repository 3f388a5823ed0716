"""Super-blocks of K-quants: scales are integers times a float16, and a search never makes a super-block worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.columns import block_length
from llmcompress.numerics.gptq import Visit, swept_codes
from llmcompress.numerics.grid import Fitted, of_groups, output_error, restore, round_to_codes
from llmcompress.numerics.quantized import QuantizedTensor
from llmcompress.numerics.ranges import fit, lesser
from llmcompress.numerics.super_blocks import per_super_block

NAMES = [f"q{bits}_k" for bits in range(2, 7)]


def weights(inputs: int = 512, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix with a dead group, a dead super-block and an outlier, and a Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = 0.02 * torch.randn(6, inputs, generator=generator) + 0.004
    weight_OI[0, :32], weight_OI[1, :256], weight_OI[2, 7] = 0, 0, 0.5
    x_TI = torch.randn(300, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return weight_OI, x_TI.T @ x_TI / 300


def errors(weight_OI: Tensor, fitted: Fitted) -> Tensor:
    return (restore(round_to_codes(weight_OI, fitted), fitted) - weight_OI).square()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inputs", [512, 560])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_scales_are_integers_times_float16_and_zeros_stay_zeros(name: str, inputs: int, search) -> None:
    weight_OI, gram_II = weights(inputs)
    grid = named_scheme(name).weights
    fitted = fit(weight_OI, grid, search=search, gram_II=gram_II)
    stored = QuantizedTensor.of(round_to_codes(weight_OI, fitted), fitted)
    assert stored.shared_scale is not None and torch.equal(stored.shared_scale.half().float(), stored.shared_scale)
    low, high = grid.scales.integers
    assert torch.equal(stored.scale, stored.scale.round()) and not (stored.scale == 0).any()
    assert low <= stored.scale.min() and stored.scale.max() <= high
    assert torch.equal(
        fitted.scale_OG, stored.scale * of_groups(stored.shared_scale[..., 0], grid, stored.scale.shape[1])
    )
    if stored.zero_point is not None:
        assert stored.zero_point.min() >= 0 and stored.zero_point.max() <= high
    again = stored.fitted
    assert torch.equal(again.scale_OG, fitted.scale_OG) and torch.equal(again.stored_OG(), stored.scale)
    assert torch.equal(stored.dense(), restore(stored.codes, fitted))
    assert not stored.dense()[1, :256].any()
    assert torch.equal(stored.rows(torch.tensor([4, 2])).dense(), stored.dense()[[4, 2]])


@pytest.mark.parametrize("name", NAMES)
def test_a_search_makes_no_super_block_worse(name: str) -> None:
    weight_OI, _ = weights()
    grid = named_scheme(name).weights
    plain, searched = fit(weight_OI, grid), fit(weight_OI, grid, search="mse")
    before_OS, after_OS = (errors(weight_OI, each).unflatten(1, (2, 256)).sum(-1) for each in (plain, searched))
    assert (after_OS <= 1.02 * before_OS).all() and after_OS.sum() < 0.95 * before_OS.sum()


@pytest.mark.parametrize("name", NAMES)
def test_a_search_that_knows_the_inputs_lowers_the_error_of_the_output(name: str) -> None:
    weight_OI, gram_II = weights()
    grid = named_scheme(name).weights

    def seen(fitted: Fitted) -> float:
        difference_OI = restore(round_to_codes(weight_OI, fitted), fitted) - weight_OI
        parts = torch.block_diag(
            *(gram_II[at : at + grid.length(512), at : at + grid.length(512)] for at in range(0, 512, grid.length(512)))
        )
        return float(output_error(difference_OI, parts))

    assert seen(fit(weight_OI, grid, search="mse", gram_II=gram_II)) < seen(fit(weight_OI, grid, search="mse"))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_sweep_ends_on_the_grid_and_beats_rounding(name: str, act_order: bool) -> None:
    weight_OI, gram_II = weights()
    grid = named_scheme(name).weights
    visit = Visit.of(gram_II, damping=0.01, act_order=act_order)
    swept = swept_codes(weight_OI, grid, gram_II, visit, scale_dtype=torch.bfloat16)
    stored = QuantizedTensor.of(swept.codes_OI, swept.fitted)
    assert torch.equal(stored.dense(), restore(swept.codes_OI, swept.fitted))
    nearest = fit(weight_OI, grid, search="mse", gram_II=gram_II)
    difference_OI = restore(round_to_codes(weight_OI, nearest), nearest) - weight_OI
    assert output_error(stored.dense() - weight_OI, gram_II) < output_error(difference_OI, gram_II)


def test_lazy_blocks_hold_whole_super_blocks() -> None:
    assert block_length(named_scheme("q4_k").weights.span, 128) == 256


def test_of_two_fits_whole_super_blocks_are_taken() -> None:
    weight_OI, _ = weights()
    grid = named_scheme("q4_k").weights
    first, second = fit(weight_OI, grid, search="mse"), fit(1.5 * weight_OI, grid)
    error_OG = torch.rand(6, 16, generator=torch.Generator().manual_seed(1))
    taken = lesser(first, second, error_OG, 1 - error_OG)
    better_OS = per_super_block(error_OG, grid) < per_super_block(1 - error_OG, grid)
    for row in range(6):
        for block in range(2):
            wanted = first if better_OS[row, block] else second
            groups = slice(8 * block, 8 * block + 8)
            assert torch.equal(taken.scale_OG[row, groups], wanted.scale_OG[row, groups])
            assert torch.equal(taken.shared[row, block], wanted.shared[row, block])


def test_weights_of_a_4_bit_grid_lose_only_what_scales_of_6_bits_take() -> None:
    """Of a checkpoint that was dequantized from groups of 32 with zero points, the search finds the grid again."""
    generator = torch.Generator().manual_seed(5)
    codes_OGN = torch.randint(0, 16, (16, 16, 32), generator=generator).float()
    scale_OG1 = 0.01 + 0.01 * torch.rand(16, 16, 1, generator=generator)
    weight_OI = ((codes_OGN - torch.randint(4, 12, (16, 16, 1), generator=generator)) * scale_OG1).flatten(1)
    error_OI = errors(weight_OI, fit(weight_OI, named_scheme("q4_k").weights, search="mse"))
    assert error_OI.sum() < 5e-4 * weight_OI.square().sum()
