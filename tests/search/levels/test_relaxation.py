"""A mixture of options: at a corner it is the plan, and its gradient is that of finite differences."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from llmcompress.plan_search.levels.bench import Bench
from llmcompress.plan_search.levels.relaxation import MixedModel
from llmcompress.plan_search.plan_space import Plan
from tests.passes.test_laws import windows
from tests.search.levels.tiny import benched, space_of, whole_model

FAMILY = "llama_gqa"
WHOLE = whole_model(FAMILY)
SPACE = space_of(WHOLE, per="group")
TEXT = windows(seed=5, count=6)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with benched(WHOLE, SPACE) as found:
        yield found


def corner(plan: Plan) -> list[np.ndarray]:
    return [np.eye(len(unit.options))[choice] for unit, choice in zip(SPACE.units, plan, strict=True)]


def random_mixture(seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.dirichlet(np.ones(len(unit.options))) for unit in SPACE.units]


@pytest.mark.parametrize("seed", range(3))
def test_at_a_corner_it_is_the_plan(bench: Bench, seed: int) -> None:
    plan = SPACE.random(np.random.default_rng(seed))
    text = bench.text(TEXT)
    loss, _ = bench.relaxation(text).loss_and_gradient(corner(plan), step=1)
    assert loss == pytest.approx(float(bench.divergences(plan, text)[4:].mean()), rel=1e-4)


@pytest.mark.parametrize("at_corner", [False, True])
def test_the_gradient_is_that_of_finite_differences(bench: Bench, at_corner: bool) -> None:
    relaxation = bench.relaxation(bench.text(TEXT))
    mixture = corner(SPACE.random(np.random.default_rng(4))) if at_corner else random_mixture(0)
    _, gradient = relaxation.loss_and_gradient(mixture, step=0)
    random = np.random.default_rng(1)
    chosen = [(unit, int(random.integers(len(SPACE.units[unit].options)))) for unit in SPACE.free]
    wanted = [difference(relaxation, mixture, unit, option) for unit, option in chosen]
    found = [gradient[unit][option] for unit, option in chosen]
    scale = float(np.abs(wanted).max())
    np.testing.assert_allclose(found, wanted, rtol=0.03, atol=3e-3 * scale)
    assert scale > 1e-3


def difference(relaxation: MixedModel, mixture: list[np.ndarray], unit: int, option: int, step: float = 2e-3) -> float:
    losses = []
    for sign in (1, -1):
        moved = [shares.copy() for shares in mixture]
        moved[unit][option] += sign * step
        losses.append(relaxation.loss_and_gradient(moved, step=0)[0])
    return (losses[0] - losses[1]) / (2 * step)
