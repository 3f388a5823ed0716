"""Integer grids against one-weight-at-a-time rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.numerics.grid import Grid, output_error, restore, round_to_codes
from llmcompress.numerics.ranges import RangeSearch, fit
from tests.reference.grid import round_one_by_one

GRIDS = st.builds(Grid, st.sampled_from([2, 3, 4, 8]), st.booleans(), st.sampled_from([None, 1, 2, 5, 7, 16, 32, 64]))
SIZES = st.sampled_from([1, 2, 3, 5, 7, 13, 31, 32, 33, 43, 64, 97])


def weights(outputs: int, inputs: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, dtype=torch.float64, generator=generator)


@settings(max_examples=60, deadline=None)
@given(GRIDS, SIZES, SIZES, st.integers(0, 10_000))
def test_rounding_equals_the_scalar_loop_on_any_shape(grid: Grid, outputs: int, inputs: int, seed: int) -> None:
    weight_OI = weights(outputs, inputs, seed)
    fitted = fit(weight_OI, grid, scale_dtype=torch.float64)
    fast = restore(round_to_codes(weight_OI, fitted), fitted)
    torch.testing.assert_close(fast, round_one_by_one(weight_OI, grid), atol=1e-12, rtol=0)


@settings(max_examples=60, deadline=None)
@given(GRIDS, SIZES, SIZES, st.integers(0, 10_000), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_error_is_at_most_half_a_step_and_zero_stays_zero(
    grid: Grid, outputs: int, inputs: int, seed: int, dtype: torch.dtype
) -> None:
    weight_OI = weights(outputs, inputs, seed).float()
    weight_OI[:, ::3] = 0
    fitted = fit(weight_OI, grid, scale_dtype=dtype)
    codes = round_to_codes(weight_OI, fitted)
    restored = restore(codes, fitted)
    assert (restored[weight_OI == 0] == 0).all()
    step = fitted.scale_OG.repeat_interleave(grid.length(inputs), 1)[:, :inputs]
    # rounding the scale to a narrow type moves the ends of the range: by half a step at 8 bits, where they are clamped
    allowed = step.abs() * (0.501 if dtype is torch.float32 else 1.01) + weight_OI.abs() * 2.0**-7
    assert ((restored - weight_OI).abs() <= allowed).all()
    assert codes.min() >= grid.low and codes.max() <= grid.high


def test_all_zero_groups_and_rows_are_defined() -> None:
    fitted = fit(torch.zeros(3, 8), Grid(4, group=4))
    assert (fitted.scale_OG == 1).all()
    assert (restore(round_to_codes(torch.zeros(3, 8), fitted), fitted) == 0).all()


@pytest.mark.parametrize(("bits", "sign"), [(2, -1), (3, -1), (4, -1), (8, 1)])
def test_the_longer_side_of_a_group_lies_where_there_is_one_code_more(bits: int, sign: int) -> None:
    weight = torch.tensor([[1.0, -0.4], [-1.0, 0.4]])
    fitted = fit(weight, Grid(bits))
    codes = round_to_codes(weight, fitted)
    outermost = 1 << (bits - 1)
    assert fitted.scale_OG[0].sign() == sign and fitted.scale_OG[1] > 0
    assert codes[1, 0] == -outermost and codes[0, 0] == (-outermost if sign < 0 else outermost - 1)
    torch.testing.assert_close(restore(codes, fitted)[:, 0], weight[:, 0])


def test_constant_and_one_sided_groups_restore_exactly_enough() -> None:
    weight = torch.tensor([[5.0, 5.0, 5.0, 5.0], [-1.0, -2.0, -3.0, -15.0]])
    fitted = fit(weight, Grid(4, symmetric=False))
    torch.testing.assert_close(restore(round_to_codes(weight, fitted), fitted), weight)


@pytest.mark.parametrize("with_gram", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_searched_ranges_are_never_worse_than_full_ranges_group_by_group(symmetric: bool, with_gram: bool) -> None:
    weight = weights(16, 64, 1).float()
    x = weights(200, 64, 2).float() @ weights(64, 64, 3).float()
    gram = x.T @ x
    grid = Grid(3, symmetric, 16)
    plain, searched = fit(weight, grid), fit(weight, grid, search="mse", gram_II=gram if with_gram else None)
    better = 0
    for group in range(4):
        part = slice(16 * group, 16 * group + 16)
        block = gram[part, part] if with_gram else torch.eye(16)
        errors = [
            output_error((restore(round_to_codes(weight, f), f) - weight)[:, part], block) for f in (plain, searched)
        ]
        assert errors[1] <= errors[0] * (1 + 1e-6)
        better += int(errors[1] < errors[0])
    assert better


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_more_bits_and_smaller_groups_never_hurt(bits: int) -> None:
    weight = weights(32, 64, 5)

    def error(grid: Grid) -> float:
        fitted = fit(weight, grid, scale_dtype=torch.float64)
        return float((restore(round_to_codes(weight, fitted), fitted) - weight).square().sum())

    assert error(Grid(bits, False, 16)) < error(Grid(bits, False, 64))
    assert bits == 2 or error(Grid(bits, False, 64)) < error(Grid(bits - 1, False, 64))


@pytest.mark.parametrize("inputs", [1, 7, 257, 600])
def test_output_error_equals_the_error_on_the_data(inputs: int) -> None:
    difference, x = weights(5, inputs, 1), weights(30, inputs, 2)
    torch.testing.assert_close(output_error(difference, x.T @ x), (x @ difference.T).square().sum())


@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_ternary_weights_are_zero_or_of_one_magnitude_per_group(search: RangeSearch) -> None:
    weight_OI = torch.randn(5, 43, generator=torch.Generator().manual_seed(0))
    weight_OI[1, ::2] = 0.0
    weight_OI[2] = 0.0
    grid = Grid(2, group=8, ternary=True)
    fitted = fit(weight_OI, grid, search=search)
    codes_OI = round_to_codes(weight_OI, fitted)
    assert set(codes_OI.unique().tolist()) == {-1, 0, 1}
    assert bool((fitted.scale_OG > 0).all()) and bool((codes_OI[weight_OI == 0] == 0).all())


def test_a_searched_ternary_scale_is_the_best_one_of_normal_weights() -> None:
    weight_OI = torch.randn(1, 1 << 16, generator=torch.Generator().manual_seed(0))
    found = float(fit(weight_OI, Grid(2, ternary=True), search="mse").scale_OG)
    assert found == pytest.approx(1.224, rel=0.1)  # Lloyd's quantizer of three levels


def test_a_search_of_ranges_may_give_the_extra_code_to_the_shorter_side() -> None:
    weight_OI = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    grid = Grid(2, group=32)
    full, found = fit(weight_OI, grid), fit(weight_OI, grid, search="joint")
    assert 0 < float((full.scale_OG * found.scale_OG < 0).double().mean()) < 0.5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("with_gram", [True, False])
def test_a_joint_search_is_never_worse_than_one_of_ranges_group_by_group(symmetric: bool, with_gram: bool) -> None:
    weight_OI, x_TI = weights(6, 64, 0), weights(100, 64, 1)
    gram_II = x_TI.T @ x_TI
    grid, lost = Grid(3, symmetric, 16), {}
    for search in ("mse", "joint"):
        fitted = fit(weight_OI, grid, search=search, gram_II=gram_II if with_gram else None)
        difference_OI = restore(round_to_codes(weight_OI, fitted), fitted) - weight_OI
        parts = difference_OI.split(16, 1)
        seen = [gram_II[at : at + 16, at : at + 16] if with_gram else torch.eye(16).double() for at in range(0, 64, 16)]
        lost[search] = torch.stack([((part @ of) * part).sum(1) for part, of in zip(parts, seen, strict=True)])
    assert bool((lost["joint"] <= lost["mse"] * (1 + 1e-9)).all())
    assert float(lost["joint"].sum()) < 0.995 * float(lost["mse"].sum())
