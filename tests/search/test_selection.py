"""Laws of fronts and of rules that pick from them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcompress.plan_search.problem import Outcome
from llmcompress.plan_search.selection import (
    SELECTIONS,
    better_uniform,
    front,
    hypervolume,
    scalar_reward,
    value,
)

AXES = ("loss", "bytes", "decode")
NUMBERS = st.floats(0.01, 10.0)
OUTCOMES = st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=30).map(
    lambda rows: [
        Outcome((index,), 8, loss, {"bytes": size, "decode": seconds})
        for index, (loss, size, seconds) in enumerate(rows)
    ]
)


def beats(one: Outcome, other: Outcome) -> bool:
    """Nowhere worse, somewhere better."""
    pairs = [(value(one, axis), value(other, axis)) for axis in AXES]
    return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)


@given(OUTCOMES)
def test_a_front_holds_what_nothing_beats_and_all_of_it(outcomes: list[Outcome]) -> None:
    found = front(outcomes, AXES)
    assert not any(beats(other, point) for point in found for other in outcomes)
    values = {tuple(value(each, axis) for axis in AXES) for each in found}
    unbeaten = [each for each in outcomes if not any(beats(other, each) for other in outcomes)]
    assert values == {tuple(value(each, axis) for axis in AXES) for each in unbeaten} and len(values) == len(found)


@given(OUTCOMES)
def test_hypervolume_never_falls_while_plans_are_judged(outcomes: list[Outcome]) -> None:
    reference = {"loss": 11.0, "bytes": 11.0, "decode": 11.0}
    volumes = [hypervolume(outcomes[: count + 1], reference) for count in range(len(outcomes))]
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(volumes))
    assert volumes[-1] == pytest.approx(hypervolume(front(outcomes, AXES), reference))


@given(OUTCOMES, st.sampled_from(["least_loss", "lexicographic", "scalarized", "hybrid"]))
def test_every_rule_picks_a_point_of_the_front_within_the_limits(outcomes: list[Outcome], name: str) -> None:
    limits = {"bytes": 5.0}
    picked = SELECTIONS[name]().pick(outcomes, limits)
    inside = [each for each in outcomes if each.costs["bytes"] <= 5.0]
    if picked is None:
        assert not inside
    else:
        assert picked in inside and not any(beats(other, picked) for other in inside)


@given(OUTCOMES, st.floats(0.0, 0.5))
def test_a_lexicographic_pick_is_within_its_tolerance_and_cheapest_there(
    outcomes: list[Outcome], tolerance: float
) -> None:
    rule = SELECTIONS["lexicographic"].model_validate({"order": ["loss", "bytes"], "tolerances": [tolerance]})
    picked = rule.pick(outcomes, {})
    assert picked is not None
    least = min(each.loss for each in outcomes)
    near = [each for each in outcomes if each.loss <= least * (1 + tolerance)]
    assert picked in near and picked.costs["bytes"] == min(each.costs["bytes"] for each in near)


def test_rewards_are_those_of_mnasnet() -> None:
    outcome = Outcome((0,), 8, 0.5, {"decode": 2.0})
    soft = scalar_reward(outcome, {"decode": 1.0}, below=-0.07, above=-0.07)
    assert soft == pytest.approx(np.exp(-0.5) * 2.0**-0.07)
    assert scalar_reward(outcome, {"decode": 1.0}, below=0.0, above=-1.0) == pytest.approx(np.exp(-0.5) / 2)
    assert scalar_reward(outcome, {"decode": 4.0}, below=0.0, above=-1.0) == pytest.approx(np.exp(-0.5))


def test_a_uniform_plan_that_is_better_at_no_more_cost_is_named() -> None:
    chosen = Outcome((0,), 8, 0.5, {"bytes": 10.0, "decode": 1.0})
    better = Outcome((1,), 8, 0.4, {"bytes": 10.0, "decode": 0.9})
    dearer = Outcome((2,), 8, 0.1, {"bytes": 11.0, "decode": 0.9})
    few_tokens = Outcome((3,), 4, 0.1, {"bytes": 10.0, "decode": 0.9})
    assert better_uniform(chosen, [dearer, better, few_tokens]) is better
    assert better_uniform(chosen, [dearer, few_tokens]) is None


def test_failed_plans_are_in_no_front() -> None:
    failed = Outcome((0,), 8, float("nan"), {"bytes": 1.0}, "not finite")
    assert front([failed], ("loss", "bytes")) == [] and SELECTIONS["least_loss"]().pick([failed], {}) is None
