"""Statistics accumulated in pieces are those of all the data at once."""

import pytest
import torch

from llmcompress.numerics.statistics import AbsMax, AbsMean, Gram, Moments, Statistic

X = torch.randn(37, 6, generator=torch.Generator().manual_seed(0))


def filled(kind: type[Statistic], x: torch.Tensor = X) -> Statistic:
    statistic = kind(6, torch.device("cpu"))
    for piece in x.split([5, 0, 20, 12]):
        statistic.add(piece)
    return statistic


def test_pieces_add_up() -> None:
    gram, largest, mean = filled(Gram), filled(AbsMax), filled(AbsMean)
    torch.testing.assert_close(gram.sum_II, X.T @ X)
    torch.testing.assert_close(largest.max_I, X.abs().amax(0))
    torch.testing.assert_close(mean.mean_I, X.abs().mean(0))
    assert gram.tokens == largest.tokens == mean.tokens == 37


def test_a_wide_gram_matrix_is_symmetric_and_whole_though_only_half_of_it_is_multiplied() -> None:
    x = torch.randn(50, 613, generator=torch.Generator().manual_seed(1))
    gram = Gram(613, torch.device("cpu"))
    for piece in x.split(20):
        gram.add(piece)
        torch.testing.assert_close(gram.sum_II[300:, :10], gram.sum_II[:10, 300:].T, atol=0, rtol=0)
    gram.rescale(torch.linspace(1, 2, 613))
    x = x / torch.linspace(1, 2, 613)
    torch.testing.assert_close(gram.sum_II, x.T @ x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [Gram, AbsMax, AbsMean])
def test_rescaling_equals_measuring_the_divided_input(kind: type[Statistic]) -> None:
    divide = torch.tensor([1.0, 2.0, 0.5, 3.0, 7.0, 0.1])
    rescaled, measured = filled(kind), filled(kind, X / divide)
    rescaled.rescale(divide)
    for name, value in vars(measured).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(rescaled, name), value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [Gram, AbsMax, AbsMean])
def test_values_that_are_not_finite_are_noticed(kind: type[Statistic], bad: float) -> None:
    assert filled(kind).is_finite()
    x = X.clone()
    x[3, 2] = bad
    assert not filled(kind, x).is_finite()


def test_a_site_that_no_token_reached_is_defined() -> None:
    assert (AbsMean(4, torch.device("cpu")).mean_I == 0).all()


def test_moments_are_the_mean_and_variance_of_all_pieces_even_far_from_zero() -> None:
    moments = filled(Moments, X + 1000)
    assert isinstance(moments, Moments) and moments.tokens == 37
    torch.testing.assert_close(moments.mean_I, (X + 1000).mean(0))
    torch.testing.assert_close(moments.variance_I, X.var(0, unbiased=False), atol=1e-3, rtol=1e-3)
    divide = torch.tensor([1.0, 2.0, 0.5, 3.0, 7.0, 0.1])
    rescaled, measured = filled(Moments), filled(Moments, X / divide)
    assert isinstance(rescaled, Moments) and isinstance(measured, Moments)
    rescaled.rescale(divide)
    torch.testing.assert_close(rescaled.variance_I, measured.variance_I)
    torch.testing.assert_close(rescaled.mean_I, measured.mean_I)
    assert not filled(Moments, X.clone().fill_(float("nan"))).is_finite()
