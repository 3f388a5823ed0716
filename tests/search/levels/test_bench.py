"""Candidates on the bench are what `compress` would make, and their divergence is that of the whole models."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from llmcompress.model.depth import drop_blocks
from llmcompress.model.skeleton import find_blocks
from llmcompress.passes.apply import apply_passes
from llmcompress.plan_search.levels.bench import Bench
from llmcompress.plan_search.levels.build import build_levels
from llmcompress.plan_search.levels.decoded import DecodedLevels
from llmcompress.plan_search.levels.path import Step
from llmcompress.plan_search.levels.store import LevelStore
from llmcompress.plan_search.plan_recipe import recipe_of
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from tests.passes.test_laws import windows
from tests.search.levels.tiny import benched, full_divergences, space_of, whole_model, without_state

WHOLE = whole_model()
SPACE = space_of(WHOLE)
TEXT = windows(seed=5, count=5)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LevelStore:
    return build_levels(WHOLE, SPACE, LevelStore(tmp_path_factory.mktemp("levels")))


@pytest.fixture(scope="module")
def bench(store: LevelStore) -> Iterator[Bench]:
    with Bench(WHOLE, SPACE, store) as found:
        yield found


def plans(count: int, seed: int = 0) -> list[Plan]:
    random = np.random.default_rng(seed)
    return [SPACE.random(random) for _ in range(count)]


@pytest.mark.parametrize("plan", plans(6), ids=range(6))
def test_divergences_are_those_of_the_assembled_model_computed_in_full(bench: Bench, plan: Plan) -> None:
    found = bench.divergences(plan, bench.text(TEXT))
    torch.testing.assert_close(found, full_divergences(WHOLE.model, bench.assembled(plan), TEXT), rtol=1e-3, atol=1e-7)
    assert found.dtype == torch.float64 and found.min() > 0


def test_the_dense_plan_has_no_divergence(bench: Bench) -> None:
    assert bench.divergences(SPACE.uniform("dense"), bench.text(TEXT)).tolist() == [0.0] * len(TEXT)


def test_a_plan_of_data_free_options_is_what_compress_makes_of_its_recipe(bench: Bench) -> None:
    plan = SPACE.uniform("rtn4")
    assert_same_as_compressed(bench, SPACE, plan)
    assert_same_as_compressed(bench, SPACE, with_dropped(plan, 1))


@pytest.mark.parametrize("body", SPACE.space.bodies)
@pytest.mark.parametrize("option", ["gptq3", "sparse", "rank"])
def test_levels_of_the_first_block_are_what_compress_makes_of_it(bench: Bench, option: str, body: str) -> None:
    """Nothing before it is compressed, so its inputs are those of the dense model in both."""
    plan = SPACE.uniform(option, body=body)
    passes = recipe_of(SPACE, plan, {"model": "tiny"}).passes
    model = apply_passes(copy.deepcopy(WHOLE.model), WHOLE.map, passes, without_state(WHOLE)).model
    wanted, found = (find_blocks(each)[0][1].state_dict() for each in (model, bench.assembled(plan)))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def with_dropped(plan: Plan, *blocks: int) -> Plan:
    changed = list(plan)
    for block in blocks:
        unit = SPACE.bodies[block]
        changed[unit] = SPACE.units[unit].options.index("dropped")
    return SPACE.canonical(tuple(changed))


def assert_same_as_compressed(bench: Bench, space: PlanSpace, plan: Plan) -> None:
    recipe = recipe_of(space, plan, {"model": "tiny"})
    wanted = apply_passes(copy.deepcopy(WHOLE.model), WHOLE.map, recipe.passes, without_state(WHOLE)).model
    found, wanted_state = bench.assembled(plan).state_dict(), wanted.state_dict()
    assert found.keys() == wanted_state.keys()
    for name, tensor in wanted_state.items():
        assert torch.equal(found[name], tensor), name


def test_dropped_blocks_are_those_that_drop_blocks_removes(bench: Bench) -> None:
    plan = with_dropped(SPACE.uniform("dense"), 0)
    model = copy.deepcopy(WHOLE.model)
    drop_blocks(model, {0})
    assert model.config.num_hidden_layers == bench.assembled(plan).config.num_hidden_layers
    torch.testing.assert_close(
        bench.divergences(plan, bench.text(TEXT)), full_divergences(WHOLE.model, model, TEXT), rtol=1e-4, atol=1e-7
    )


def test_the_order_of_plans_and_the_room_of_the_caches_change_no_number(bench: Bench, store: LevelStore) -> None:
    dense = SPACE.uniform("rtn4")
    several = [*plans(4, seed=3), *list(SPACE.neighbours(dense))[::7], dense]
    text = bench.text(TEXT)
    found = {plan: bench.divergences(plan, text) for plan in several}
    for plan in reversed(several):
        assert torch.equal(bench.divergences(plan, text), found[plan])
    states = TEXT[:, 1:].numel() * WHOLE.map.hidden_size * 4
    for decoded, room in ((0, 0), (2 * 64 * 96 * 4, 3 * states)):
        with Bench(WHOLE, SPACE, store, decoded_bytes=decoded, states_bytes=room) as poor:
            for plan in several:
                assert torch.equal(poor.divergences(plan, poor.text(TEXT)), found[plan])


def test_states_of_earlier_plans_are_used_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[int] = []
    sound = DecodedLevels.block

    def noting(self: DecodedLevels, step: Step) -> torch.nn.Module:
        run.append(step.block)
        return sound(self, step)

    monkeypatch.setattr(DecodedLevels, "block", noting)
    plan = SPACE.uniform("gptq3")
    last = max(SPACE.free)
    bench.divergences(plan, bench.text(TEXT))
    bench.divergences((*plan[:last], 0, *plan[last + 1 :]), bench.text(TEXT))
    assert run == [0, 1, 2, 2]


def test_a_narrow_body_has_the_sizes_of_the_pass_and_is_described_by_a_plain_config(bench: Bench) -> None:
    model = bench.assembled(SPACE.uniform("dense", body="ffn-50"))
    assert model.config.intermediate_size == WHOLE.model.config.intermediate_size // 2


FAMILIES = ["gpt2", "falcon_old", "gemma2", "phi3", "qwen3_moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_block_is_judged_as_it_is_assembled(family: str) -> None:
    whole = whole_model(family)
    bodies = {"bodies": {"whole": []}} if family == "qwen3_moe" else {}  # its experts are fused here
    space = space_of(whole, per="group", most_dropped=0, **bodies)
    plan = space.random(np.random.default_rng(2))
    with benched(whole, space) as bench:
        found = bench.divergences(plan, bench.text(TEXT))
        model = bench.assembled(plan)
    torch.testing.assert_close(found, full_divergences(whole.model, model, TEXT), rtol=2e-3, atol=1e-6)


BEFORE = {"none": [], "rotated": [{"rotation": {}}], "sliced": [{"slicegpt": {"fraction": 0.2}}]}
AFTER = {
    "none": [],
    "coded": [{"embeddings": {"embedding": "int4_channel", "head": "int4_channel"}}],
    "healed": [{"recover": {"rank": 2, "training": {"steps": 2, "batch": 2, "learning_rate": 1e-3}}}],
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("after", AFTER)
def test_choices_for_the_whole_model_count(wide: tuple[PlanSpace, Bench], before: str, after: str) -> None:
    space, bench = wide
    plan = space.uniform("rtn4", before=before, after=after)
    found = bench.divergences(plan, bench.text(TEXT))
    model = bench.assembled(plan)
    torch.testing.assert_close(found, full_divergences(WHOLE.model, model, TEXT), rtol=2e-3, atol=1e-6)


@pytest.fixture(scope="module")
def wide() -> Iterator[tuple[PlanSpace, Bench]]:
    sites = {"dense": [], "rtn4": [{"rtn": {"scheme": "int4_channel"}}]}
    space = space_of(WHOLE, sites=sites, bodies={"whole": []}, most_dropped=0, before=BEFORE, after=AFTER)
    with benched(WHOLE, space) as bench:
        yield space, bench


def test_the_model_is_as_it_was(bench: Bench) -> None:
    before = {name: tensor.clone() for name, tensor in WHOLE.model.state_dict().items()}
    for plan in plans(2, seed=8):
        bench.divergences(plan, bench.text(TEXT))
        bench.assembled(plan)
    after = WHOLE.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
