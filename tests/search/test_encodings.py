"""Plans survive every encoding."""

from __future__ import annotations

import numpy as np
import pytest

from llmcompress.plan_search.encodings import PathEncoding, graph_of, plan_of
from tests.search import toy


@pytest.mark.parametrize("per", ["site", "group", "block"])
def test_one_hot_paths_and_graphs_lead_back_to_the_plan(per: str) -> None:
    space = toy.plan_space(blocks=3, per=per, most_dropped=0.4)
    random, paths = np.random.default_rng(0), PathEncoding(space)
    plans = [space.random(random) for _ in range(100)]
    assert any(space.dropped(plan) for plan in plans)
    assert [paths.decode(row) for row in paths.encode(plans)] == plans
    assert [space.from_one_hot(row) for row in space.one_hot(plans)] == plans
    assert [plan_of(space, graph_of(space, plan)) for plan in plans] == plans


def test_different_plans_have_different_paths() -> None:
    space = toy.plan_space(blocks=2, most_dropped=0.5)
    plans = list(toy.all_plans(space))
    assert len(np.unique(PathEncoding(space).encode(plans), axis=0)) == len(plans)


def test_a_graph_is_a_chain_without_dropped_blocks() -> None:
    space = toy.plan_space(blocks=3, most_dropped=0.4)
    plan = space.plan({"layers.1 (body)": "dropped"})
    graph = graph_of(space, plan)
    adjacency = graph.adjacency()
    assert not any(name.startswith("layers.1") for name, _ in graph.nodes)
    assert adjacency.sum() == len(graph.nodes) - 1 and not np.tril(adjacency).any()
