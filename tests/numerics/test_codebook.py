"""Codebooks of columns, against one column at a time and against all partitions."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from llmcompress.numerics.codebook import (
    column_bits,
    column_levels,
    level_values,
    nearest_level,
    outliers,
    squared_errors,
    without,
)


def values(columns: int, outputs: int, seed: int = 0) -> Tensor:
    return torch.randn(columns, outputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lloyd(column: list[float], levels: int, turns: int = 15) -> list[float]:
    """The textbook loop on one column."""
    ordered = sorted(column)
    last = len(ordered) - 1
    centres = [ordered[min(int((i + 0.5) / levels * len(ordered)), last)] for i in range(levels)]
    for _ in range(turns):
        members: list[list[float]] = [[] for _ in centres]
        for value in column:
            members[min(range(levels), key=lambda i: (abs(value - centres[i]), i))].append(value)
        centres = [sum(each) / len(each) if each else centre for each, centre in zip(members, centres, strict=True)]
    return centres


@pytest.mark.parametrize(("outputs", "levels"), [(1, 2), (7, 4), (13, 2), (64, 8)])
def test_levels_equal_the_textbook_loop_on_each_column(outputs: int, levels: int) -> None:
    weight = values(3, outputs)
    found = column_levels(weight, levels)
    for column, row in zip(weight.tolist(), found.tolist(), strict=True):
        assert row == pytest.approx(lloyd(column, levels))
        assert row == sorted(row)


def test_few_values_get_an_error_close_to_the_best_partition() -> None:
    for seed in range(10):
        weight = values(1, 9, seed)
        ordered = weight[0].sort().values
        best = min(
            sum(float((part - part.mean()).square().sum()) for part in (ordered[:i], ordered[i:j], ordered[j:]))
            for i, j in combinations(range(1, 9), 2)
        )
        levels = column_levels(weight, 3)
        error = float((level_values(nearest_level(weight, levels), levels) - weight).square().sum())
        assert best - 1e-12 <= error <= 3 * best


def test_codes_are_those_of_the_nearest_levels() -> None:
    weight = values(5, 33)
    levels = column_levels(weight, 4)
    codes = nearest_level(weight, levels)
    assert torch.equal(codes.long(), (weight[:, :, None] - levels[:, None]).abs().argmin(-1))


def test_as_many_levels_as_values_lose_nothing_and_more_bits_lose_less() -> None:
    weight = values(4, 8)
    levels = column_levels(weight, 8)
    torch.testing.assert_close(level_values(nearest_level(weight, levels), levels), weight)
    errors = squared_errors(values(6, 50), (1, 2, 3, 4))
    assert (errors.diff(dim=1) < 0).all()


def test_outliers_are_two_sets_without_a_weight_in_common() -> None:
    weight = values(20, 30)
    squares = values(1, 30, 1)[0].square()
    places = outliers(weight, squares, 0.01)
    assert len(places) == len(set(places.tolist())) == 2 * 6 and torch.equal(places, places.sort().values)
    effect = (weight.abs() * squares.sqrt()).flatten()
    assert set(effect.topk(6).indices.tolist()) <= set(places.tolist())
    assert len(outliers(weight, None, 0.0)) == 0
    assert len(outliers(weight, None, 0.01)) == 12


def test_what_is_kept_aside_does_not_move_the_rest() -> None:
    weight = values(6, 5)
    places = torch.tensor([0, 7, 29])
    rest = without(weight, places)
    kept = torch.ones(30, dtype=torch.bool)
    kept[places] = False
    assert torch.equal(rest.flatten()[kept], weight.flatten()[kept])
    assert rest[0, 0] == pytest.approx(float(weight[1:, 0].mean()))


def test_bits_of_a_column_are_whole_bytes_of_codes_and_its_codebook() -> None:
    assert column_bits(10, 3, 16) == 32 + 8 * 16
    assert column_bits(8, 1, 32) == 8 + 64
