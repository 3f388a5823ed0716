"""Estimated losses are about the divergence that single changes cause."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from llmcompress.plan_search.levels.bench import Bench
from llmcompress.plan_search.levels.build import build_levels
from llmcompress.plan_search.levels.store import LevelStore
from tests.search.levels.tiny import space_of, whole_model

WHOLE = whole_model()
SPACE = space_of(WHOLE, bodies={"whole": [], "ffn-90": [{"width": {"fraction": 0.1, "heads": False}}]})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LevelStore:
    return build_levels(WHOLE, SPACE, LevelStore(tmp_path_factory.mktemp("levels")))


def test_estimates_order_single_changes_as_their_divergences_do(store: LevelStore) -> None:
    losses, dense = store.losses(SPACE), SPACE.uniform("dense")
    changes = list(SPACE.neighbours(dense))
    with Bench(WHOLE, SPACE, store) as bench:
        text = bench.text(WHOLE.context.windows_NT)
        measured = [float(bench.divergences(plan, text).mean()) for plan in changes]
    estimated = [losses.total(SPACE, plan) for plan in changes]
    ratios = np.array(estimated) / np.array(measured)
    assert kendalltau(estimated, measured).statistic > 0.6
    assert 0.2 < float(np.median(ratios)) < 5


def test_what_changes_nothing_loses_nothing(store: LevelStore) -> None:
    losses = store.losses(SPACE)
    assert losses.total(SPACE, SPACE.uniform("dense")) == 0
    for unit, table in losses.of_sites.items():
        assert table.shape == (2, len(SPACE.units[unit].options)) and (table[:, 1:] > 0).all()


def test_levels_before_what_a_body_changes_are_stored_once(store: LevelStore, tmp_path: Path) -> None:
    block = store.block(0)
    assert block.owner("ffn-90", "self_attn.q_proj") == "whole" and block.owner("ffn-90", "mlp.down_proj") == "ffn-90"
    assert block.sizes("ffn-90")["mlp.down_proj"][1] < block.sizes("whole")["mlp.down_proj"][1]
    level = block.level("ffn-90", "mlp.down_proj", "rtn4")
    assert not any(tensor.dtype == torch.float32 and tensor.numel() > 64 * 86 for tensor in level.tensors.values())
