"""A sub-network is a slice of the supernet; sizes learn together, in order, without spoiling the largest."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.model.probe import map_model
from llmcompress.model.units import unit_groups
from llmcompress.plan_search.plan_space import PlanSpace
from llmcompress.plan_search.proxies.supernet.elastic import (
    ElasticSettings,
    SupernetJudge,
    phases,
    smallest,
    trained_supernet,
)
from llmcompress.plan_search.proxies.supernet.nested import SubNet, running_as, sliced, sort_channels, subnet_of
from llmcompress.plan_search.space import Space
from llmcompress.training.settings import Training
from tests.families import tiny_model, tiny_tokens
from tests.search.proxies.candidates import candidates

BODIES = {
    "whole": [],
    "half": [{"width": {"fraction": 0.5, "heads": False}}],
    "most": [{"width": {"fraction": 0.25, "heads": False}}],
}
SPACE = {"sites": {"dense": []}, "per": "block", "bodies": BODIES, "most_dropped": 0.4}
FAMILIES = ["llama_gqa", "gpt2", "phi3"]


def whole_of(family: str) -> WholeModel:
    model = tiny_model(family)
    return WholeModel(model, map_model(model), RunContext(tiny_tokens(family, 8, 16), batch=4))


def space_of(whole: WholeModel, **changes: object) -> PlanSpace:
    return PlanSpace(Space.model_validate({**SPACE, **changes}), whole.map)


@torch.no_grad()
def logits(model: torch.nn.Module, family: str) -> torch.Tensor:
    return model(input_ids=tiny_tokens(family, 2, 12, seed=5)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_sorting_channels_changes_nothing_that_is_computed_and_puts_the_important_first(family):
    whole = whole_of(family)
    before = logits(whole.model, family)
    sort_channels(whole, score="l2")
    torch.testing.assert_close(logits(whole.model, family), before, atol=1e-5, rtol=1e-5)
    sites = {site.name: site for site in whole.sites()}
    for group in unit_groups(whole.map):
        if group.kind == "channels":
            total_U = torch.zeros(group.units)
            for part in group.parts:
                weight_OI = sites[group.block.full(part.site)].weight_OI
                lines = weight_OI if part.axis == "rows" else weight_OI.T
                total_U += torch.stack([lines[list(indices)].square().sum() for indices in part.indices])
            # the score of a unit may leave a part out, or weigh it: the ends of the order agree in any case
            assert total_U[: group.units // 2].mean() > total_U[group.units // 2 :].mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sub_network_is_the_first_channels_and_the_remaining_blocks(family):
    whole = whole_of(family)
    first, _, last = (group for group in unit_groups(whole.map) if group.kind == "channels")
    subnet = SubNet({first.name: 17, last.name: 40}, frozenset({1}))
    with running_as(whole.model, whole.map, subnet):
        running = logits(whole.model, family)
    model = sliced(whole.model, whole.map, subnet)
    torch.testing.assert_close(logits(model, family), running, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(whole.model, family), running, atol=1e-3)
    kept = [index for index in range(len(whole.map.blocks)) if index not in subnet.skipped]
    groups = {group.block.index: group for group in unit_groups(whole.map) if group.kind == "channels"}
    for place, index in enumerate(kept):
        group = groups[index]
        reader = group.readers[0].removeprefix(f"{group.block.name}.")
        info = group.block.structure.site(reader)
        large = whole.model.get_submodule(group.readers[0]).weight
        small = model.get_submodule(f"{whole.map.blocks[place].name}.{reader}").weight
        count = subnet.kept.get(group.name, group.units)
        assert torch.equal(small, large[:count] if info.transposed else large[:, :count])


def test_the_size_of_a_plan_is_that_of_its_bodies_and_heads_are_refused():
    whole = whole_of("llama_gqa")
    space = space_of(whole)
    subnet = subnet_of(space, space.uniform("dense", body="half"))
    assert set(subnet.kept.values()) == {48} and len(subnet.kept) == 3 and not subnet.skipped
    heads = space_of(whole, bodies={"whole": [], "narrow": [{"width": {"fraction": 0.5}}]})
    with pytest.raises(CompressError, match="removes heads"):
        subnet_of(heads, heads.uniform("dense", body="narrow"))


def test_sizes_are_added_from_wide_to_narrow_and_dropping_comes_last():
    space = space_of(whole_of("llama_gqa"))
    assert [(list(each.space.bodies), each.space.most_dropped) for each in phases(space)] == [
        (["whole", "most"], 0.0),
        (["whole", "most", "half"], 0.0),
        (["whole", "half", "most"], 0.4),
    ]
    random = np.random.default_rng(0)
    least = [smallest(space, random) for _ in range(20)]
    assert all(len(each.skipped) == 1 and set(each.kept.values()) <= {48} for each in least)
    assert len({each.skipped for each in least}) == 3
    with pytest.raises(CompressError, match="one size"):
        phases(space_of(whole_of("llama_gqa"), bodies={"whole": []}, most_dropped=0.0))


@pytest.mark.parametrize("rank", [None, 4])
def test_sub_networks_learn_and_the_largest_is_not_spoiled(rank):
    bench = candidates(SPACE, windows=16)
    before = copy.deepcopy(bench.whole.model.state_dict())
    training = Training(steps=12, batch=8, learning_rate=2e-3)
    settings = ElasticSettings(training=training, drawn=1, rank=rank, score="l2")
    untrained = WholeModel(copy.deepcopy(bench.whole.model), bench.whole.map, bench.whole.context)
    sort_channels(untrained, score="l2")
    trained = trained_supernet(bench.whole, bench.space, settings)
    # random models learn nothing about other text from a few random tokens: they are judged on those
    windows_NT = bench.whole.context.windows_NT
    plain, elastic = (SupernetJudge(bench, windows_NT, each, bench.space) for each in (untrained, trained))
    full, half = bench.space.uniform("dense"), bench.space.uniform("dense", body="half")
    assert elastic.loss(half, 256) < 0.9 * plain.loss(half, 256)
    assert elastic.loss(full, 256) < 0.3 * plain.loss(half, 256)
    assert all(torch.equal(value, before[name]) for name, value in bench.whole.model.state_dict().items())


def test_checkpointing_is_refused_since_sub_networks_would_be_gone():
    with pytest.raises(ValueError, match="no checkpointing"):
        ElasticSettings(training=Training(gradient_checkpointing=True))
