"""Judges of candidates: stages, single options, healing, and short trainings in place of long ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llmcompress.errors import CompressError
from llmcompress.plan_search.plan_space import PlanSpace
from llmcompress.plan_search.problem import Outcome, Proposal
from llmcompress.plan_search.proxies.base import ChangedJudge, StreamedJudge, answered
from llmcompress.plan_search.proxies.flash import AppliedPasses, shortened, with_short_trainings
from llmcompress.plan_search.proxies.halving import stage_correlations, successive_halving
from llmcompress.plan_search.proxies.healing import Healing, HealingSettings
from llmcompress.plan_search.proxies.single_options import kl_sensitivity, single_changes
from llmcompress.plan_search.space import Space
from tests.search.proxies.candidates import SPACE, candidates, judged_windows

DISTILLED = {**SPACE, "after": {"none": [], "healed": [{"distill": {"training": {"steps": 40, "batch": 2}}}]}}


def test_more_tokens_contain_fewer_and_the_dense_plan_loses_nothing():
    bench = candidates()
    judge = StreamedJudge(bench, judged_windows())
    int2 = bench.space.uniform("int2")
    each = bench.divergences(int2, bench.text(judged_windows()))
    for windows, tokens in ((1, 16), (2, 17), (2, 32), (4, 10**6)):
        assert judge.loss(int2, tokens) == pytest.approx(float(each[:windows].mean()), rel=1e-5)
    assert judge.loss(bench.space.uniform("dense"), 64) == pytest.approx(0, abs=1e-6)


def test_a_candidate_put_together_is_judged_as_the_streamed_one():
    bench = candidates()
    plan = bench.space.random(np.random.default_rng(4))
    judges = StreamedJudge(bench, judged_windows()), ChangedJudge(bench, judged_windows())
    assert judges[0].loss(plan, 64) == pytest.approx(judges[1].loss(plan, 64), rel=1e-5)
    assert judges[0].fingerprint != judges[1].fingerprint


def test_halving_keeps_the_best_third_and_judges_survivors_on_more_tokens():
    losses = {(index,): float(index) for index in range(9)}
    losses[3,] = math.inf
    asked: list[tuple[int, int]] = []
    steps = successive_halving(reversed(losses), (10, 100, 1000))
    told: list[Outcome] = []
    proposals = next(steps)
    with pytest.raises(StopIteration) as end:
        while True:
            asked.append((proposals[0].tokens, len(proposals)))
            outcomes = [Outcome(each.plan, each.tokens, losses[each.plan] + 1 / each.tokens) for each in proposals]
            told += outcomes
            proposals = steps.send(outcomes)
    assert asked == [(10, 9), (100, 3), (1000, 1)]
    assert [each.plan for each in end.value.value] == [(0,)]
    found = stage_correlations(told)
    assert found[10, 100].tau == 1 and found[10, 100].count == 3
    assert (100, 1000) not in found, "one plan has no order"


def test_nothing_survives_where_all_fail():
    steps = successive_halving([(0,), (1,)], (10, 100))
    next(steps)
    with pytest.raises(StopIteration) as end:
        steps.send([Outcome((0,), 10, math.inf), Outcome((1,), 10, math.nan)])
    assert end.value.value == []


def test_sensitivity_is_exact_for_plans_that_differ_in_one_unit():
    bench = candidates()
    judge = StreamedJudge(bench, judged_windows())
    around = bench.space.uniform("int4")
    found = kl_sensitivity(judge, bench.space, 64, around=around)
    assert found.total(bench.space, around) == pytest.approx(judge.loss(around, 64))
    changes = list(single_changes(bench.space, around))
    # three blocks: two other options of linears, a narrow body, dropped
    assert len(changes) == 3 * 4 and len(bench.asked) == 2 + len(changes)
    for _, _, plan in changes:
        dropped = bench.space.dropped(plan)
        expected = judge.loss(plan, 64)
        assert found.total(bench.space, plan) == pytest.approx(expected, rel=1e-6), (plan, dropped)


@pytest.mark.parametrize("train", ["norms_and_scales", "weights"])
def test_healing_brings_candidates_nearer_to_the_dense_model_and_leaves_codes_and_the_dense_model_alone(train):
    bench = candidates(windows=16)
    before = {name: value.clone() for name, value in bench.whole.model.state_dict().items()}
    settings = HealingSettings(train=train, steps=12, windows=4, rate=0.02)
    healing = Healing(bench.whole, bench.space, settings)
    # random models learn nothing about other text from a few random tokens: they are judged on those
    plain, healed = (ChangedJudge(bench, bench.whole.context.windows_NT, each) for each in ([], [healing]))
    quantized = bench.space.uniform("int2")
    dropped = list(bench.space.uniform("int4", body="narrow"))
    dropped[bench.space.bodies[1]] = bench.space.units[bench.space.bodies[1]].options.index("dropped")
    for plan in (quantized, tuple(dropped)):
        assert healed.loss(plan, 256) < 0.98 * plain.loss(plan, 256)
    assert all(torch.equal(value, before[name]) for name, value in bench.whole.model.state_dict().items())
    codes = [module.state_dict() for module in bench.assembled(quantized).modules() if hasattr(module, "codes")]
    after = healing(quantized, bench.assembled(quantized))
    kept = [module.state_dict() for module in after.modules() if hasattr(module, "codes")]
    if train == "norms_and_scales":
        assert all(torch.equal(one["codes"], other["codes"]) for one, other in zip(codes, kept, strict=True))
    assert healing.fingerprint != Healing(bench.whole, bench.space, HealingSettings()).fingerprint


def test_healing_keeps_zeros():
    sparse = {"sites": {"half": [{"magnitude": {"sparsity": 0.5}}]}, "per": "block"}
    bench = candidates(sparse)
    plan = bench.space.uniform("half")
    healing = Healing(bench.whole, bench.space, HealingSettings(train="weights", steps=4, rate=0.05))
    before, after = bench.assembled(plan), healing(plan, bench.assembled(plan))
    changed = 0
    for name, value in before.named_parameters():
        if "layers" in name and value.dim() > 1:
            now = after.get_parameter(name)
            assert torch.equal(now == 0, value == 0)
            changed += int(not torch.equal(now, value))
    assert changed


def test_flash_distillation_takes_a_share_of_the_steps_and_plans_mean_the_same():
    space = PlanSpace(Space.model_validate(DISTILLED), candidates().whole.map)
    short = with_short_trainings(space)
    assert [each.training.steps for each in short.space.after["healed"]] == [2]
    assert short.units == space.units and short.space.sites == space.space.sites
    assert [each.training.steps for each in shortened(space.space.after["healed"], 1e-6)] == [1]
    with pytest.raises(CompressError, match="no choice of this space trains"):
        with_short_trainings(PlanSpace(Space.model_validate(SPACE), space.model_map))


def test_training_as_a_change_is_the_training_of_the_plan():
    recover = {**SPACE, "after": {"none": [], "healed": [{"recover": {"training": {"steps": 6, "batch": 2}}}]}}
    bench = candidates(recover)
    plan = bench.space.uniform("dense", body="narrow", after="healed")
    bare = bench.space.uniform("dense", body="narrow")
    passes = AppliedPasses(bench.space.space.after["healed"], bench.whole.context)
    one = ChangedJudge(bench, judged_windows()).loss(plan, 64)
    other = ChangedJudge(bench, judged_windows(), [passes]).loss(bare, 64)
    assert one == pytest.approx(other, rel=1e-6)
    assert one != pytest.approx(StreamedJudge(bench, judged_windows()).loss(bare, 64), rel=1e-3)


def test_proposals_are_answered_by_a_judge():
    bench = candidates()
    judge = StreamedJudge(bench, judged_windows())
    plans = [bench.space.uniform(name) for name in ("int2", "int4", "dense")]
    outcomes, survivors = answered(successive_halving(plans, (16, 64), keep=0.4), judge)
    assert [each.plan for each in outcomes[:3]] == plans and all(each.tokens == 16 for each in outcomes[:3])
    assert survivors[0].plan == plans[2] and survivors[0].tokens == 64
    assert Proposal(plans[2], 64).plan == survivors[0].plan
