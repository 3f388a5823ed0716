"""Masks and budgets against sorting by hand; the pruning sweep against the paper's loop in float64."""

import itertools

import pytest
import torch
from torch import Tensor

from llmcompress.errors import CompressError
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.columns import (
    DropLowest,
    DropWeights,
    RoundToGrid,
    block_length,
    inverse_factor,
    sweep_columns,
)
from llmcompress.numerics.grid import Grid, output_error, restore, round_to_codes
from llmcompress.numerics.masks import (
    Pattern,
    count_of_zeros,
    lie_on_a_grid,
    lowest,
    lowest_counts,
    lowest_per_group,
    lowest_per_row,
    named_pattern,
    zeros_first,
)
from llmcompress.numerics.ranges import fit
from llmcompress.numerics.sparsity_allocation import counts_by_error, counts_by_outliers
from llmcompress.numerics.statistics import Gram, Sketch, SquaredNorm
from tests.numerics.test_columns import damped, problem
from tests.reference import masks as reference

SHAPES = [(1, 1), (1, 7), (5, 1), (13, 31), (7, 43), (16, 64), (48, 16)]
SHARES = [0.0, 0.1, 0.5, 0.503, 0.9, 0.999]


def scores(shape: tuple[int, ...], *, values: int | None = None, seed: int = 0) -> Tensor:
    """Random scores; with `values`, that many different ones, so that there are ties everywhere."""
    generator = torch.Generator().manual_seed(seed)
    if values is None:
        return torch.rand(shape, generator=generator)
    return torch.randint(0, values, shape, generator=generator).float()


@pytest.mark.parametrize("values", [None, 1, 2, 5])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_equal_sorting_by_hand_and_drop_exactly_the_share(
    shape: tuple[int, int], share: float, values: int | None
) -> None:
    score = scores(shape, values=values)
    wanted = count_of_zeros(share, score.numel())
    everywhere = lowest(score, wanted)
    assert torch.equal(everywhere.flatten(), torch.tensor(reference.smallest_of(score.flatten().tolist(), wanted)))
    rows = lowest_per_row(score, share)
    assert torch.equal(rows, reference.per_row(score, share))
    assert int(everywhere.sum()) == int(rows.sum()) == wanted


@pytest.mark.parametrize("values", [None, 1, 3, 100_000])
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.9999])
def test_masks_of_many_weights_are_as_exact_as_those_of_few(share: float, values: int | None) -> None:
    """From a size on, a sample narrows the search, also when most of the weights are equal."""
    score = scores((600, 513), values=values)
    wanted = count_of_zeros(share, score.numel())
    mask = lowest(score, wanted).flatten()
    order = score.flatten().argsort(stable=True)
    assert torch.equal(mask.nonzero().flatten(), order[:wanted].sort().values)


@pytest.mark.parametrize("beyond", [-1, 0, 1, 200, 401, 402, 403])
def test_a_misleading_sample_costs_time_and_never_a_weight(beyond: int) -> None:
    """Of 80 scores one is looked at; here these lie in the middle, and which of them is sought is up to the others."""
    looked_at, step = 4096, 80
    score = torch.full((looked_at, step), 0.9)
    score[:, 0] = torch.linspace(0.4, 0.6, looked_at)
    wanted, low = looked_at * step // 2, looked_at // 2 - 200  # the search begins 200 below the middle of the sample
    others = score[:, 1:].reshape(-1)
    others[: wanted - low - beyond] = 0.1
    score[:, 1:] = others.view(looked_at, step - 1)
    mask = lowest(score, wanted).flatten()
    assert torch.equal(mask.nonzero().flatten(), score.flatten().argsort(stable=True)[:wanted].sort().values)


@pytest.mark.parametrize("values", [None, 1, 2, 5])
@pytest.mark.parametrize("name", ["2:4", "4:8", "1:4", "3:4", "1:2", "5:16", "2:3"])
def test_a_pattern_has_exactly_n_zeros_in_every_group(name: str, values: int | None) -> None:
    pattern = named_pattern(name)
    assert pattern and pattern.name == name
    score = scores((9, 5 * pattern.of), values=values)
    mask = lowest_per_group(score, pattern)
    assert torch.equal(mask, reference.per_group(score, pattern.zeros, pattern.of))
    assert (mask.view(9, 5, pattern.of).sum(-1) == pattern.zeros).all()


@pytest.mark.parametrize("name", ["4:2", "4:4", "0:4", "2:", "half", "2:4:8", ""])
def test_other_patterns_are_refused(name: str) -> None:
    assert named_pattern("unstructured") is None
    with pytest.raises(CompressError, match="is not a sparsity pattern"):
        named_pattern(name)


def test_weights_that_are_zero_already_are_dropped_first() -> None:
    weight = torch.tensor([[0.0, 3.0, 0.0, 1.0]])
    tied = torch.zeros(1, 4)
    assert lowest(zeros_first(tied, weight), 2).tolist() == [[True, False, True, False]]
    assert lowest_per_group(zeros_first(tied, weight), Pattern(2, 4)).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("values", [None, 1, 3])
@pytest.mark.parametrize("share", SHARES)
def test_one_threshold_for_all_parts_is_exact_however_many_ties(share: float, values: int | None) -> None:
    parts = [scores(shape, values=values, seed=seed) for seed, shape in enumerate([(3, 5), (7, 11), (1, 1), (20, 4)])]
    every = torch.cat([part.flatten() for part in parts])
    wanted = count_of_zeros(share, every.numel())
    mask = torch.tensor(reference.smallest_of(every.tolist(), wanted))
    expected = [int(each.sum()) for each in mask.split([part.numel() for part in parts])]
    assert lowest_counts(lambda: iter(parts), wanted) == expected


@pytest.mark.parametrize("lazy", [1, 8, 128])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pruning_sweep_equals_the_papers_loop(shape: tuple[int, int], share: float, lazy: int) -> None:
    weight, gram = problem(*shape, seed=2)
    weight[:, ::3] *= (torch.arange(shape[0]) % 4 != 0)[:, None]
    factor = inverse_factor(gram, 0.01)
    assert factor is not None
    dropping = DropLowest(weight, factor.upper_II, share=share, pattern=None, span=lazy)
    fast = sweep_columns(weight, factor.upper_II, dropping, block=lazy)
    slow = reference.sparsegpt(weight, damped(gram, 0.01), share=share, span=lazy, pattern=None)
    torch.testing.assert_close(fast, slow, atol=1e-8, rtol=0)
    assert (fast[weight == 0] == 0).all()
    assert int((fast == 0).sum()) >= count_of_zeros(share, weight.numel())


@pytest.mark.parametrize("name", ["2:4", "4:8", "1:4", "3:4"])
def test_pruning_sweep_chooses_every_group_from_weights_already_corrected(name: str) -> None:
    pattern = named_pattern(name)
    assert pattern
    weight, gram = problem(11, 48, seed=4)
    factor = inverse_factor(gram, 0.01)
    assert factor is not None
    dropping = DropLowest(weight, factor.upper_II, share=pattern.share, pattern=pattern, span=1)
    fast = sweep_columns(weight, factor.upper_II, dropping, block=16)
    slow = reference.sparsegpt(weight, damped(gram, 0.01), share=0.0, span=1, pattern=(pattern.zeros, pattern.of))
    torch.testing.assert_close(fast, slow, atol=1e-8, rtol=0)
    assert ((fast == 0).view(11, -1, pattern.of).sum(-1) == pattern.zeros).all()


def test_exactly_the_share_is_dropped_where_the_papers_code_drops_ties_too() -> None:
    """48 × 16 weights at 50 %: a threshold with `<=` at place n·p drops 0.5013 of them."""
    weight, gram = problem(48, 16, seed=5)
    factor = inverse_factor(gram, 0.01)
    assert factor is not None
    dropping = DropLowest(weight, factor.upper_II, share=0.5, pattern=None, span=16)
    assert int((sweep_columns(weight, factor.upper_II, dropping) == 0).sum()) == 48 * 16 // 2


def test_sum_of_column_losses_is_the_damped_output_error() -> None:
    weight, gram = problem(13, 31, seed=3)
    factor = inverse_factor(gram, 0.02)
    assert factor is not None
    losses = []

    class Recording(DropLowest):
        def __call__(self, column: int, weight_O: Tensor) -> Tensor:
            new_O = super().__call__(column, weight_O)
            losses.append(((weight_O - new_O) / factor.upper_II[column, column]).square().sum())
            return new_O

    swept = sweep_columns(
        weight, factor.upper_II, Recording(weight, factor.upper_II, share=0.6, pattern=None, span=8), block=8
    )
    torch.testing.assert_close(sum(losses), output_error(swept - weight, damped(gram, 0.02)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("grid", [Grid(4, True, 8), Grid(3, False, 16), Grid(8, False, None)], ids=str)
@pytest.mark.parametrize("pattern", [None, Pattern(2, 4), Pattern(4, 8)], ids=str)
def test_joint_sweep_leaves_codes_whose_zeros_are_exact(grid: Grid, pattern: Pattern | None) -> None:
    weight, gram = problem(9, 48, seed=6)
    factor = inverse_factor(gram, 0.01)
    assert factor is not None
    lazy = block_length(grid.group, 16)
    rounding = RoundToGrid(weight, grid, scale_dtype=torch.float64, search="minmax", gram_II=gram)
    dropping = DropLowest(weight, factor.upper_II, share=0.5, pattern=pattern, span=lazy, then=rounding)
    swept = sweep_columns(weight, factor.upper_II, dropping, block=lazy)
    restored = restore(rounding.codes_IO.T, rounding.fitted)
    torch.testing.assert_close(restored, swept, atol=1e-12, rtol=0)
    assert (restored[dropping.zero_IO.T] == 0).all()
    assert int(dropping.zero_IO.sum()) == 9 * 48 // 2


@pytest.mark.parametrize("scheme", ["int4_g32", "int4_g64", "int3_channel", "int4_g32_asym", "ternary_g32"])
def test_zeros_of_a_dequantized_matrix_lie_on_its_grid(scheme: str) -> None:
    for seed in range(5):
        dense = dequantized(gaussian(seed), scheme)
        assert bool((dense == 0).any()) and lie_on_a_grid(dense)


@pytest.mark.parametrize(
    ("share", "scheme"), [(0.01, None), (0.1, None), (0.5, None), (0.5, "int4_g32"), (0.9, "int4_g64")]
)
@pytest.mark.parametrize("kind", ["magnitude", "wanda", "random", "2:4"])
def test_zeros_of_pruning_do_not_even_where_the_others_were_rounded(
    kind: str, share: float, scheme: str | None
) -> None:
    weight = gaussian(3).bfloat16().float()
    energy = torch.rand(256, generator=torch.Generator().manual_seed(4)) * 3
    scores = {"magnitude": weight.abs(), "wanda": weight.abs() * energy, "random": energy.expand_as(weight)}
    by_row = kind != "2:4"
    mask = lowest_per_row(scores[kind], share) if by_row else lowest_per_group(weight.abs(), Pattern(2, 4))
    pruned = weight.masked_fill(mask, 0.0)
    assert not lie_on_a_grid(pruned if scheme is None else dequantized(pruned, scheme))


def test_a_matrix_without_zeros_or_of_zeros_alone_or_too_narrow_lies_on_none() -> None:
    for weight in (gaussian(0), torch.zeros(48, 256), torch.zeros(3, 8), torch.eye(64)):
        assert not lie_on_a_grid(weight)


def gaussian(seed: int) -> Tensor:
    return torch.randn(300, 256, generator=torch.Generator().manual_seed(seed))


def dequantized(weight: Tensor, scheme: str) -> Tensor:
    fitted = fit(weight, named_scheme(scheme).weights, scale_dtype=torch.float16)
    return restore(round_to_codes(weight, fitted), fitted).bfloat16().float()


def test_rounding_sweep_keeps_zeros_and_repairs_their_error() -> None:
    """As if every column were treated by hand: a zero's error is its whole corrected value."""
    weight, gram = problem(6, 24, seed=7)
    weight = weight.masked_fill(lowest(weight.abs(), 70), 0.0)
    factor = inverse_factor(gram, 0.01)
    assert factor is not None
    grid = Grid(4, False, None)
    rounding = RoundToGrid(weight, grid, scale_dtype=torch.float64, search="minmax", gram_II=gram)
    fast = sweep_columns(weight, factor.upper_II, DropWeights((weight == 0).T.contiguous(), rounding), block=5)
    scale, zero = rounding.fitted.scale_OG[:, 0], rounding.fitted.zero_OG[:, 0]
    slow, damped_gram = weight.clone(), damped(gram, 0.01)
    for column in range(24):
        inverse = torch.linalg.inv(damped_gram[column:, column:])
        new = ((slow[:, column] / scale + zero).round().clamp(grid.low, grid.high) - zero) * scale
        new[weight[:, column] == 0] = 0
        error = (slow[:, column] - new) / inverse[0, 0]
        slow[:, column:] -= error[:, None] * inverse[0]
        slow[:, column] = new
    torch.testing.assert_close(fast, slow, atol=1e-8, rtol=0)
    assert (fast[weight == 0] == 0).all()
    torch.testing.assert_close(restore(rounding.codes_IO.T, rounding.fitted), fast)


def test_outlier_counts_keep_the_total_and_the_bound_and_follow_the_outliers() -> None:
    weights = torch.tensor([1000, 3000, 2001, 999])
    outliers = torch.tensor([0.05, 0.01, 0.02, 0.03])
    counts = counts_by_outliers(outliers, weights, 0.7, 0.08)
    shares = counts / weights
    assert int(counts.sum()) == count_of_zeros(0.7, int(weights.sum()))
    assert shares.argsort().tolist() == outliers.argsort(descending=True).tolist()
    assert abs(float((shares - 0.7).abs().max()) - 0.08) < 1e-3
    equal = counts_by_outliers(torch.ones(4), weights, 0.5, 0.1)
    assert int(equal.sum()) == 3500 and (equal - weights / 2).abs().max() <= 1


def test_error_counts_are_the_best_of_all_choices() -> None:
    """Convex curves, every combination of the shares tried: none with this total has a smaller sum."""
    shares = torch.tensor([0.2, 0.4, 0.6, 0.8])
    weights = torch.tensor([100, 100, 300])
    errors = torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.1, 0.2, 0.4, 5.0], [3.0, 4.0, 6.0, 9.0]])
    best = min(
        (sum(float(errors[part, choice]) for part, choice in enumerate(choices)), choices)
        for choices in itertools.product(range(4), repeat=3)
        if int(sum(shares[choice] * weights[part] for part, choice in enumerate(choices)) + 0.5) == 260
    )
    counts = counts_by_error(errors, shares, weights, 260 / 500)
    assert counts.tolist() == [int(shares[choice] * weights[part] + 0.5) for part, choice in enumerate(best[1])]


def test_error_counts_step_over_a_dent_and_spend_exactly_the_budget() -> None:
    """A curve that is flat, then steep, then flat is followed on its convex side only."""
    shares, weights = torch.tensor([0.3, 0.4, 0.5, 0.6, 0.7]), torch.tensor([101, 57])
    errors = torch.tensor([[0.0, 5.0, 6.0, 6.5, 7.0], [0.0, 1.0, 2.0, 3.0, 9.0]])
    for target in (0.3, 0.35, 0.5, 0.61, 0.7):
        counts = counts_by_error(errors, shares, weights, target)
        assert int(counts.sum()) == count_of_zeros(target, 158)
        assert ((counts / weights - 0.5).abs() <= 0.2 + 1 / 57).all()


def test_squared_norm_is_the_diagonal_of_the_gram_matrix_and_the_sketch_estimates_its_errors() -> None:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(500, 20, generator=generator) @ torch.randn(20, 20, generator=generator)
    difference = torch.randn(30, 20, generator=generator)
    device = torch.device("cpu")
    gram, norm, sketch = Gram(20, device), SquaredNorm(20, device), Sketch(20, device)
    for part in x.split(137):
        for statistic in (gram, norm, sketch):
            statistic.add(part)
    factors = torch.rand(20, generator=generator) + 0.5
    for statistic in (gram, norm, sketch):
        statistic.rescale(factors)
        assert statistic.is_finite() and statistic.tokens == 500
    torch.testing.assert_close(norm.sum_I, gram.sum_II.diagonal())
    exact = float(output_error(difference, gram.sum_II))
    assert abs(sketch.output_error(difference) / exact - 1) < 0.2
