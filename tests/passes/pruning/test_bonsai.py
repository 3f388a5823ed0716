"""Bonsai finds useless units, and never asks for a gradient."""

from __future__ import annotations

import pytest
import torch

from llmcompress.passes.pruning.bonsai import Bonsai
from llmcompress.passes.pruning.units import unit_groups
from tests.families import tiny_model
from tests.passes.pruning.test_width import logits, map_of, pruned, whole_model


def test_bonsai_removes_units_that_do_nothing_although_the_prior_likes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """By l2 the units that are cut off from their readers are the largest; the loss does not care for them."""
    family = "llama"
    model = tiny_model(family, seed=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, :24] = 0
            layer.mlp.up_proj.weight[:24] *= 1.2
    whole = whole_model(family, model)  # before gradients are forbidden: the map is made with some

    map_of(family)  # mapping asks for gradients

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    bonsai = Bonsai(ratio=0.25, step=0.25, heads=False, prior="random", masks=120, windows=6)
    kept = bonsai.decide(whole)
    groups = [group for group in unit_groups(map_of(family)) if group.kind == "channels"]
    useless = sum(int((kept[group.key] < 24).sum()) for group in groups)
    assert all(len(kept[group.key]) == 72 for group in groups)
    # half of the units are candidates; of 72 useless ones a random choice would keep 54
    assert useless < 45


def test_rounds_remove_the_same_number_from_every_layer_and_repeat() -> None:
    bonsai = Bonsai(ratio=0.5, step=0.2, masks=10, windows=2, round_to=8)
    first, again = (bonsai.decide(whole_model("llama_gqa")) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert {len(kept) for kept in first.values()} == {1, 48}
    model, rows = pruned("llama_gqa", bonsai)
    assert torch.isfinite(logits(model)).all() and {row.algorithm for row in rows} == {"bonsai"}


def test_a_global_budget_works_in_rounds_too() -> None:
    bonsai = Bonsai(ratio=0.3, step=0.15, masks=10, windows=2, allocation="global", prior="taylor_first")
    groups = unit_groups(map_of("llama_gqa"))
    kept = bonsai.decide(whole_model("llama_gqa"))
    target = 0.3 * sum(group.units * group.parameters for group in groups)
    gone = sum((group.units - len(kept[group.key])) * group.parameters for group in groups)
    assert abs(gone - target) <= max(group.parameters for group in groups) / 2
