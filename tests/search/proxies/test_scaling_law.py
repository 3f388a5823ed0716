"""The law is found where it holds, and turned around."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmcompress.errors import CompressError
from llmcompress.plan_search.proxies.scaling_law import ScalingLaw, fit_scaling_law

TOKENS = [2.0**power for power in range(12, 20)]


@pytest.mark.parametrize(("floor", "amount", "exponent"), [(0.5, 300.0, 0.7), (0.0, 20.0, 0.25), (3.0, 5e4, 1.3)])
def test_a_law_that_holds_exactly_is_found(floor, amount, exponent):
    law = ScalingLaw(floor, amount, exponent, 0.0)
    found = fit_scaling_law(TOKENS, [law.loss(tokens) for tokens in TOKENS])
    assert found.error < 2e-3
    assert found.exponent == pytest.approx(exponent, abs=0.02)
    assert found.loss(2.0**22) == pytest.approx(law.loss(2.0**22), rel=0.05)


def test_tokens_are_those_after_which_the_loss_is_expected():
    law = ScalingLaw(0.5, 300.0, 0.7, 0.0)
    assert law.loss(law.tokens(0.6)) == pytest.approx(0.6)
    assert law.tokens(0.5) == math.inf == law.tokens(0.1)


def test_noise_is_told_as_the_error():
    law, noise = ScalingLaw(0.5, 300.0, 0.7, 0.0), np.random.default_rng(0).normal(size=len(TOKENS)) * 0.03
    found = fit_scaling_law(TOKENS, [law.loss(n) * (1 + e) for n, e in zip(TOKENS, noise, strict=True)])
    assert 0.005 < found.error < 0.05


@pytest.mark.parametrize("losses", [[1.0, 0.9, 0.8], [1.0, 0.9, 0.8, 0.0], [1.0, math.inf, 0.8, 0.7]])
def test_too_few_points_and_losses_that_are_none_are_refused(losses):
    with pytest.raises(CompressError, match="at least 4"):
        fit_scaling_law(TOKENS[: len(losses)], losses)
