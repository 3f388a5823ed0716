"""Fake quantization: values of the grid to the bit, gradients of a slow reference and of finite differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmcompress.numerics.fake_quant import (
    fake_quantized,
    gradient_times,
    passing,
    restored,
    rounded_integers,
    step_gradient_factor,
    storable_scales,
    straight_through,
)
from llmcompress.numerics.formats import (
    E2M1,
    E4M3,
    E5M2,
    NF4,
    POWER_OF_TWO,
    SINGLE,
    STORED,
    TWO_LEVEL,
)
from llmcompress.numerics.grid import Fitted, Grid, restore, round_to_codes
from llmcompress.numerics.ranges import fit
from tests.reference.fake_quant import one_by_one, surrogate

GRIDS = [
    Grid(bits, symmetric, group) for bits in (2, 3, 4, 8) for symmetric in (True, False) for group in (None, 5, 16)
]
GRIDS += [Grid.of(E4M3), Grid.of(E4M3, None, SINGLE), Grid.of(E5M2, 5), Grid.of(E2M1, 16), Grid.of(NF4, 5)]
GRIDS += [Grid.of(E2M1, 8, POWER_OF_TWO), Grid.of(E2M1, 4, TWO_LEVEL)]
ROWS, COLUMNS = 3, 17


def named(grid: Grid) -> str:
    number = grid.number.name if grid.number else f"int{grid.bits}{'' if grid.symmetric else '_asym'}"
    return f"{number}_{grid.group}_{grid.scales.name}"


def beyond(grid: Grid, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Fitted]:
    """Weights and ranges that cover about half of them."""
    weight_OI = torch.randn(ROWS, COLUMNS, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    fitted = fit(weight_OI.float(), grid)
    # E5M2 is scaled to a reach far below its largest value
    shrunk_OG = fitted.scale_OG * (2.0**-8 if grid.number == E5M2 else 0.5 if grid.scales != STORED else 0.37)
    return weight_OI, replace(fitted, scale_OG=shrunk_OG.to(dtype), zero_OG=fitted.zero_OG.to(dtype))


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_values_are_those_of_the_codes_to_the_bit(grid: Grid, dtype: torch.dtype) -> None:
    weight_OI, fitted = beyond(grid, dtype)
    codes_OI = round_to_codes(weight_OI, fitted)
    expected = restore(codes_OI, fitted)
    trained = replace(fitted, scale_OG=leaf(fitted.scale_OG), zero_OG=leaf(fitted.zero_OG))
    assert torch.equal(fake_quantized(leaf(weight_OI), trained), expected)
    assert torch.equal(restored(codes_OI, trained), expected)
    with torch.no_grad():
        assert torch.equal(fake_quantized(weight_OI, fitted), expected)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_gradients_are_those_of_lsq_one_weight_at_a_time(grid: Grid, clip: bool) -> None:
    weight_OI, fitted = beyond(grid)
    outer_OI = torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight, scale, zero = leaf(weight_OI), leaf(fitted.scale_OG), leaf(fitted.zero_OG)
    value = fake_quantized(weight, replace(fitted, scale_OG=scale, zero_OG=zero), clip=clip)
    (value * outer_OI).sum().backward()
    expected = one_by_one(weight_OI, fitted, outer_OI, clip=clip)
    torch.testing.assert_close(value.detach(), expected[0], atol=1e-12, rtol=0)
    assert weight.grad is not None and scale.grad is not None
    torch.testing.assert_close(weight.grad, expected[1], atol=1e-12, rtol=0)
    torch.testing.assert_close(scale.grad, expected[2], atol=1e-10, rtol=1e-10)
    if grid.number is None:
        assert zero.grad is not None
        torch.testing.assert_close(zero.grad, expected[3], atol=1e-12, rtol=0)
    assert not clip or 0 < int((expected[1] == 0).sum()) < expected[1].numel()


@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_gradients_are_the_finite_differences_of_the_surrogate(grid: Grid) -> None:
    weight_OI, fitted = beyond(grid, seed=3)
    leaves = leaf(weight_OI), leaf(fitted.scale_OG), leaf(fitted.zero_OG)
    outer_OI = torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    value = fake_quantized(leaves[0], replace(fitted, scale_OG=leaves[1], zero_OG=leaves[2]))
    gradients = torch.autograd.grad((value * outer_OI).sum(), leaves, materialize_grads=True, allow_unused=True)

    def loss(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        moved = replace(fitted, scale_OG=scale, zero_OG=zero)
        return (surrogate(weight, moved, (weight_OI, fitted)) * outer_OI).sum()

    points = [each.detach() for each in leaves][: 3 if grid.number is None else 2]
    for place, point in enumerate(points):
        step = 1e-6 * (float(point.abs().max()) or 1.0)
        for index in range(0, point.numel(), 3):
            around = []
            for sign in (1, -1):
                moved = [each.detach().clone() for each in leaves]
                moved[place].view(-1)[index] += sign * step
                around.append(float(loss(*moved)))
            difference = (around[0] - around[1]) / (2 * step)
            assert difference == pytest.approx(float(gradients[place].view(-1)[index]), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=named)
def test_with_fixed_codes_the_gradient_is_that_of_plain_multiplication(grid: Grid) -> None:
    weight_OI, fitted = beyond(grid)
    codes_OI = round_to_codes(weight_OI, fitted)
    leaves = leaf(fitted.scale_OG), leaf(fitted.zero_OG)

    def value(scale: Tensor, zero: Tensor) -> Tensor:
        return restored(codes_OI, replace(fitted, scale_OG=scale, zero_OG=zero))

    # multiplication has true gradients
    assert torch.autograd.gradcheck(value, leaves)


def test_the_straight_way_is_exact_where_adding_the_difference_is_not() -> None:
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0)).mul(1e3).requires_grad_()
    rounded = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(straight_through(exact, rounded), rounded)
    assert not torch.equal(exact + (rounded - exact).detach(), rounded)
    inside = rounded > 0
    straight_through(exact, rounded, inside).mul(3).sum().backward()
    assert exact.grad is not None and torch.equal(exact.grad, inside * 3.0)


def test_without_gradients_nothing_is_recorded_and_the_function_runs_once() -> None:
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(x.requires_grad)
        return x.round()

    x = torch.tensor([0.4, 1.6], requires_grad=True)
    with torch.no_grad():
        assert not passing(function, x).requires_grad
    assert not passing(function, x.detach()).requires_grad
    y = passing(function, x)
    assert calls == [True, False, False] and y.tolist() == [0, 2]
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 1]


@pytest.mark.parametrize("clip", [True, False])
def test_clipping_stops_the_gradient_half_a_step_beyond_the_outermost_code(clip: bool) -> None:
    values = torch.tensor([-8.6, -8.4, 0.3, 7.4, 7.6], requires_grad=True)
    rounded = rounded_integers(values, -8, 7, clip=clip)
    rounded.sum().backward()
    assert rounded.tolist() == [-8, -8, 0, 7, 7]
    assert values.grad is not None and values.grad.tolist() == ([0, 1, 1, 1, 0] if clip else [1] * 5)


def test_the_step_sizes_gradient_is_divided_by_the_root_of_weights_times_steps() -> None:
    assert step_gradient_factor(Grid(4, True, 32), 7, 64) == pytest.approx((32 * 7) ** -0.5)
    assert step_gradient_factor(Grid(3, True, None), 7, 64) == pytest.approx((64 * 3) ** -0.5)
    assert step_gradient_factor(Grid(2, False, 16), 7, 64) == pytest.approx((16 * 3) ** -0.5)
    assert step_gradient_factor(Grid(4, True, 32), 7, 20) == pytest.approx((20 * 7) ** -0.5)
    assert step_gradient_factor(Grid.of(E4M3, None, SINGLE), 7, 64) == pytest.approx((7 * 64 * 448) ** -0.5)
    x = torch.ones(2, requires_grad=True)
    y = gradient_times(x, 0.25)
    y.sum().backward()
    assert torch.equal(y, x) and x.grad is not None and x.grad.tolist() == [0.25, 0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [STORED, SINGLE, POWER_OF_TWO, TWO_LEVEL], ids=lambda kind: kind.name)
def test_scales_become_storable_keep_their_sign_and_stay_where_they_began(kind: object, dtype: torch.dtype) -> None:
    grid = Grid.of(E2M1, 4, kind) if kind != STORED else Grid(3, True, 4)  # type: ignore[arg-type]
    weight_OI = torch.randn(6, 24, generator=torch.Generator().manual_seed(2))
    fitted = fit(weight_OI, grid, scale_dtype=dtype)
    first_OG = fitted.scale_OG

    def storable(scale_OG: Tensor) -> Tensor:
        return storable_scales(scale_OG, first_OG, grid, dtype, fitted.shared)

    assert torch.equal(storable(first_OG), first_OG)
    assert torch.equal(storable(first_OG * 1.0001), first_OG) or dtype == torch.float32
    moved = leaf(first_OG * torch.linspace(-2, 3, first_OG.numel()).view_as(first_OG))
    found = storable(moved)
    assert (found.sign() == first_OG.sign()).all()
    stored = found.detach() if fitted.shared is None else found.detach() * fitted.shared
    assert torch.equal(stored.to(dtype).float(), stored)
    if kind == POWER_OF_TWO:
        assert (torch.frexp(found.detach()).mantissa == 0.5).all()
    if kind == TWO_LEVEL:
        assert torch.equal(E4M3.nearest(stored), stored)
    found.sum().backward()
    assert moved.grad is not None and (moved.grad == 1).all()


def test_a_scale_takes_the_power_of_two_that_is_nearest_by_ratio() -> None:
    first = torch.ones(1, 6)
    moved = torch.tensor([[0.7, 0.71, 1.41, 1.42, 2.8, 2.9]])
    found = storable_scales(moved, first, Grid.of(E2M1, 32, POWER_OF_TWO), torch.float32, None)
    assert found.tolist() == [[0.5, 1, 1, 2, 2, 4]]
