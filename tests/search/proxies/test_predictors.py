"""Predictors order plans that they have not seen; what was learned elsewhere helps; τ is what it is defined as."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from transformers import LlamaConfig

from llmcompress.errors import CompressError
from llmcompress.model.probe import probe
from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.proxies.correlation import held_out_losses, rank_correlation
from llmcompress.plan_search.proxies.predictors.base import PREDICTORS, fit_plans
from llmcompress.plan_search.space import Space

QUICK = {"mlp": {"members": 3, "hidden": (16,)}}
SPACE = {
    "sites": {
        "dense": [],
        "int4": [{"rtn": {"scheme": "int4_g16"}}],
        "int2": [{"rtn": {"scheme": "int2_g16"}}],
    },
    "bodies": {"whole": [], "narrow": [{"width": {"fraction": 0.5, "heads": False}}]},
    "most_dropped": 0.5,
}


@cache
def space() -> PlanSpace:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return PlanSpace(Space.model_validate(SPACE), probe(config, unfuse=True))


def plans(count: int, seed: int = 0) -> list[Plan]:
    random = np.random.default_rng(seed)
    return [space().random(random) for _ in range(count)]


def effects() -> np.ndarray:
    """What each option adds to the logarithm of the loss."""
    return np.random.default_rng(7).normal(size=space().one_hot(plans(1)).shape[1]) * 0.5


def loss(plan: Plan) -> float:
    """Options multiply, and dropping several blocks does more harm than each of them alone."""
    return float(np.exp(space().one_hot([plan])[0] @ effects() + 0.3 * len(space().dropped(plan)) ** 2))


def dense_linears(plan: Plan) -> Plan:
    return space().canonical(tuple(0 if u.kind == "sites" else c for u, c in zip(space().units, plan, strict=True)))


@pytest.mark.parametrize("name", list(PREDICTORS))
def test_a_predictor_orders_plans_that_it_has_not_seen(name):
    known, unseen = plans(120), plans(60, seed=1)
    learned = fit_plans(PREDICTORS[name](**QUICK.get(name, {})), space(), known, [loss(plan) for plan in known])
    assert rank_correlation(learned.losses(unseen), [loss(plan) for plan in unseen]).tau > 0.6


@pytest.mark.parametrize("name", list(PREDICTORS))
def test_the_same_seed_gives_the_same_forecast_and_draws_scatter_around_it(name):
    known, unseen = plans(40), plans(5, seed=1)
    fit = [
        fit_plans(PREDICTORS[name](**QUICK.get(name, {})), space(), known, [loss(plan) for plan in known], seed=3)
        for _ in range(2)
    ]
    assert np.array_equal(fit[0].losses(unseen), fit[1].losses(unseen))
    draws = np.stack([fit[0].drawn(unseen, np.random.default_rng(seed)) for seed in range(400)])
    features = space().one_hot(unseen)
    spread = fit[0].forecast.spread(features)
    assert (spread > 0).all()
    np.testing.assert_allclose(np.log(draws).mean(0), fit[0].forecast.mean(features), atol=0.25 * spread.max())
    np.testing.assert_allclose(np.log(draws).std(0), spread, rtol=0.25)


@pytest.mark.parametrize("name", list(PREDICTORS))
def test_an_exact_estimate_to_start_from_leaves_nothing_to_learn(name):
    known, unseen = plans(12), plans(20, seed=1)
    parts = np.abs(effects())
    at = iter(parts)
    of_unit, of_sites = {}, {}
    for index, unit in enumerate(space().units):
        rise = np.array([next(at) for _ in unit.options])
        if unit.body is None:
            of_unit[index] = rise
        else:
            of_sites[index] = np.tile(rise, (len(space().space.bodies), 1))
    estimate = Additive(0.1, of_unit, of_sites)
    truth = [estimate.total(space(), plan) for plan in known]
    learned = fit_plans(PREDICTORS[name](**QUICK.get(name, {})), space(), known, truth, start=estimate)
    expected = [estimate.total(space(), plan) for plan in unseen]
    np.testing.assert_allclose(learned.losses(unseen), expected, rtol=1e-3)


@pytest.mark.parametrize("name", list(PREDICTORS))
def test_what_dense_plans_taught_helps_where_few_compressed_plans_were_judged(name):
    predictor = PREDICTORS[name](**QUICK.get(name, {}))
    dense = list(dict.fromkeys(dense_linears(plan) for plan in plans(400, seed=2)))
    start = fit_plans(predictor, space(), dense, [loss(plan) for plan in dense])
    unseen = plans(80, seed=1)
    truth = [loss(plan) for plan in unseen]
    gains = []
    for seed in range(5):
        few = plans(16, seed=10 + seed)
        losses = [loss(plan) for plan in few]
        with_start, alone = (fit_plans(predictor, space(), few, losses, start=each) for each in (start, None))
        taus = [rank_correlation(each.losses(unseen), truth).tau for each in (with_start, alone)]
        gains.append(taus[0] - taus[1])
    assert np.mean(gains) > 0.02


def test_failed_plans_are_left_out_and_too_few_are_refused():
    known = plans(30)
    losses = [loss(plan) for plan in known]
    ridge = PREDICTORS["ridge"]()
    alone = fit_plans(ridge, space(), known[:20], losses[:20]).losses(known)
    beside = fit_plans(ridge, space(), known, losses[:20] + [float("inf")] * 10).losses(known)
    assert np.array_equal(alone, beside)
    with pytest.raises(CompressError, match="cannot learn from 3"):
        fit_plans(ridge, space(), known[:3], losses[:3])


def test_tau_is_the_share_of_pairs_in_order_minus_that_of_pairs_out_of_order():
    random = np.random.default_rng(0)
    one, other = random.normal(size=12), random.normal(size=12)
    pairs = [(i, j) for i in range(12) for j in range(i)]
    slow = np.mean([np.sign(one[i] - one[j]) * np.sign(other[i] - other[j]) for i, j in pairs])
    found = rank_correlation(one, other)
    assert found.tau == pytest.approx(slow) and found.count == 12 and 0.05 < found.error < 0.4
    assert rank_correlation([1, 2, float("inf")], [1, 2, 3]).tau == 1


def test_held_out_losses_are_of_predictors_that_have_not_seen_the_plan():
    known = list(dict.fromkeys(plans(60)))
    losses = [loss(plan) for plan in known]
    spoiled = [losses[0] * 1e6, *losses[1:]]
    ridge = PREDICTORS["ridge"]()
    clean, changed = (held_out_losses(ridge, space(), known, each)[0] for each in (losses, spoiled))
    assert clean == changed
