"""Float formats of few bits against their definitions."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from llmcompress.numerics.formats import (
    E2M1,
    E4M3,
    E5M2,
    NF4,
    POWER_OF_TWO,
    SINGLE,
    STORED,
    TWO_LEVEL,
    NumberFormat,
    ScaleKind,
)
from llmcompress.numerics.grid import Fitted, Grid, output_error, restore, round_to_codes
from llmcompress.numerics.ranges import fit
from tests.reference import formats as slow

TABLES: list[tuple[NumberFormat, list[float]]] = [
    (E4M3, slow.E4M3),
    (E5M2, slow.E5M2),
    (E2M1, slow.E2M1),
    (NF4, list(NF4.values)),
]
KINDS: list[tuple[NumberFormat, int | None, ScaleKind]] = [
    (E4M3, None, STORED),
    (E4M3, 7, STORED),
    (E4M3, None, SINGLE),
    (E5M2, None, STORED),
    (E5M2, None, SINGLE),
    (E2M1, None, STORED),
    (E2M1, 16, STORED),
    (NF4, 64, STORED),
    (NF4, 5, STORED),
    (E2M1, 32, POWER_OF_TWO),
    (E4M3, 32, POWER_OF_TWO),
    (E2M1, 16, TWO_LEVEL),
]
by_name = pytest.mark.parametrize(("number", "values"), TABLES, ids=[each.name for each, _ in TABLES])
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0].name}-{kind[1]}-{kind[2].name}")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@by_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_value_comes_back(number: NumberFormat, values: list[float], dtype: torch.dtype) -> None:
    codes = torch.tensor([code for code, value in enumerate(values) if not math.isnan(value)])
    codes = codes.to(torch.uint8).view(torch.int8)
    meant = torch.tensor([value for value in values if not math.isnan(value)], dtype=dtype)
    assert torch.equal(number.decode(codes, dtype), meant)
    assert torch.equal(number.decode(number.encode(meant), dtype), meant)
    assert torch.equal(number.nearest(meant), meant)
    assert int(codes.min()) >= number.low and int(codes.max()) < number.low + 2**number.bits
    assert number.encode(torch.zeros(3)).dtype == torch.int8
    assert (number.decode(number.encode(torch.zeros(3)), dtype) == 0).all()


@by_name
def test_rounding_is_to_nearest_with_ties_to_even_and_saturates(number: NumberFormat, values: list[float]) -> None:
    finite = sorted({value for value in values if not math.isnan(value)})
    middles = [(a + b) / 2 for a, b in pairwise(finite)]
    tried = [*middles, *(normal(300) * max(finite) / 3).tolist(), *(normal(100) / 100).tolist(), 1e6, -1e6, 1e-9]
    got = number.nearest(torch.tensor(tried, dtype=torch.float32))
    codes = number.encode(torch.tensor(tried, dtype=torch.float32))
    expected = [slow.nearest(value, values) for value in torch.tensor(tried).tolist()]
    if number is NF4:  # the middles of its values are no float32: which side they fall on is free
        expected[: len(middles)] = got[: len(middles)].tolist()
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=0)
    assert torch.equal(number.decode(codes, torch.float32), got)


@pytest.mark.parametrize(("number", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)])
def test_codes_are_the_bits_of_torch_casts(number: NumberFormat, dtype: torch.dtype) -> None:
    x = normal(2000) * 50
    assert torch.equal(number.encode(x).view(torch.uint8), x.to(dtype).view(torch.uint8))


def test_nf4_holds_the_published_quantiles() -> None:
    # Dettmers et al., appendix E: quantiles of N(0, 1), eight on each side of zero, an exact zero, scaled to -1 … 1
    normal_cdf = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    positive = normal_cdf.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -normal_cdf.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    values = torch.cat([positive, negative, torch.zeros(1)]).sort().values
    torch.testing.assert_close(torch.tensor(NF4.values), values / values.max(), atol=1e-5, rtol=0)


@by_kind
@pytest.mark.parametrize("inputs", [1, 31, 64, 97])
def test_weights_become_the_nearest_value_of_their_group(
    kind: tuple[NumberFormat, int | None, ScaleKind], inputs: int
) -> None:
    number, group, scales = kind
    table = {each.name: values for each, values in TABLES}[number.name]
    grid = Grid.of(number, group, scales)
    weight = normal(3, inputs) * 0.05
    weight[:, ::4] = 0
    fitted = fit(weight, grid)
    assert fitted.scale_OG.shape == grid.scale_shape(3, inputs)
    restored = restore(round_to_codes(weight, fitted), fitted)
    assert (restored[weight == 0] == 0).all()
    for o, row in enumerate(weight.tolist()):
        for i, value in enumerate(row):
            scale = float(fitted.scale_OG[0 if scales.single else o, i // grid.length(inputs)])
            expected = slow.nearest(float(torch.tensor(value) / scale), table) * scale
            assert float(restored[o, i]) == pytest.approx(expected, rel=1e-6, abs=0)


@by_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_values_of_their_kind(kind: tuple[NumberFormat, int | None, ScaleKind], dtype: torch.dtype) -> None:
    number, group, scales = kind
    weight = normal(4, 96) * torch.tensor([1.0, 1e-3, 1e-6, 0.0])[:, None]
    fitted = fit(weight, Grid.of(number, group, scales), scale_dtype=dtype)
    scale = fitted.scale_OG
    assert (scale > 0).all() and scale.isfinite().all()
    if scales == TWO_LEVEL:
        assert fitted.shared is not None
        local = fitted.stored_OG()
        assert torch.equal(E4M3.nearest(local), local) and 224 <= float(local.max()) <= 448
        again = Fitted.of_stored(fitted.grid, local.to(dtype), None, fitted.shared)
        assert torch.equal(again.scale_OG, scale)
        # the usual amax ÷ (448 · 6), up to the next power of two
        ideal = math.log2(float(weight.abs().max()) / (448 * 6))
        assert float(1 / fitted.shared) == 2.0 ** math.ceil(ideal)
    else:
        assert torch.equal(scale.to(dtype).float(), scale)
    restored = restore(round_to_codes(weight, fitted), fitted)
    assert (restored[3] == 0).all()
    relative = (restored - weight)[0].norm() / weight[0].norm()
    assert relative < (0.06 if number.bits == 8 else 0.25)


def test_power_of_two_scales_follow_the_specification() -> None:
    for number, most in ((E2M1, 2), (E4M3, 8)):
        weight = normal(50, 32, seed=3)
        fitted = fit(weight, Grid.of(number, 32, POWER_OF_TWO))
        for row, scale in zip(weight.tolist(), fitted.scale_OG[:, 0].tolist(), strict=True):
            largest = max(abs(value) for value in row)
            assert scale == 2.0 ** (math.floor(math.log2(largest)) - most)


@by_kind
@pytest.mark.parametrize("with_gram", [False, True])
def test_searched_scales_are_never_worse(kind: tuple[NumberFormat, int | None, ScaleKind], with_gram: bool) -> None:
    number, group, scales = kind
    weight, x = normal(16, 64, seed=1), normal(200, 64, seed=2) @ normal(64, 64, seed=3)
    gram = x.T @ x if with_gram else torch.eye(64)
    grid = Grid.of(number, group, scales)
    plain, searched = fit(weight, grid), fit(weight, grid, search="mse", gram_II=gram if with_gram else None)
    length = grid.length(64)
    for start in range(0, 64, length):
        part = slice(start, min(start + length, 64))
        errors = [
            float(output_error((restore(round_to_codes(weight, f), f) - weight)[:, part], gram[part, part]))
            for f in (plain, searched)
        ]
        assert errors[1] <= errors[0] * (1 + 1e-5)


def test_a_search_of_nvfp4_is_nowhere_worse_than_the_better_of_four_and_six() -> None:
    """Four over Six: a group's largest weight lies on 6, or on 4, whichever loses less."""
    weight = normal(64, 128, seed=5)
    searched = fit(weight, Grid.of(E2M1, 16, TWO_LEVEL), search="mse")
    assert searched.shared is not None
    groups = weight.view(64, 8, 16)
    largest = groups.abs().amax(-1)

    def error(scale: Tensor) -> Tensor:
        return (E2M1.nearest(groups / scale[..., None]) * scale[..., None] - groups).square().sum(-1)

    six, four = (error(E4M3.nearest(largest / top * searched.shared) / searched.shared) for top in (6, 4))
    better = torch.minimum(six, four)
    assert (four < six).float().mean() > 0.2 and better.sum() < 0.95 * six.sum()
    assert (error(searched.scale_OG) <= better * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_integers_of_any_width_lie_between_their_neighbours(bits: int) -> None:
    weight = normal(32, 64)

    def error(width: int) -> float:
        fitted = fit(weight, Grid(width, group=16))
        codes = round_to_codes(weight, fitted)
        assert int(codes.min()) >= -(2 ** (width - 1)) and int(codes.max()) < 2 ** (width - 1)
        return float((restore(codes, fitted) - weight).square().sum())

    assert error(bits + 1) < error(bits) < error(bits - 1)
