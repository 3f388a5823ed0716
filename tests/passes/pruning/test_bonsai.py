"""Bonsai's choice fits the loss better than its prior's, and it never asks for a gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmcompress.model.units import masked, unit_groups
from llmcompress.passes.pruning.bonsai import Bonsai
from llmcompress.passes.pruning.width import Width
from llmcompress.progress import Silent
from tests.passes.pruning.test_width import logits, map_of, masks, pruned, whole_model


class Notes(Silent):
    """Remembers what was noted."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_forward_passes_alone_find_a_better_choice_than_the_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    family = "llama"
    notes, whole = Notes(), whole_model(family)
    whole = whole.within(replace(whole.context, progress=notes))
    groups = unit_groups(map_of(family))

    def loss(removed: dict[str, Tensor]) -> float:
        with whole.resident() as model, torch.no_grad(), masked(model, groups, masks(groups, removed)):
            return float(whole.loss(whole.context.windows_NT))

    prior = Width(fraction=0.25, heads=False, score="l2", refit="none").decide(whole)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a backward pass")

    with monkeypatch.context() as patched:
        patched.setattr(torch.autograd, "grad", refuse)
        patched.setattr(torch.Tensor, "backward", refuse)
        found = Bonsai(fraction=0.25, step=0.25, heads=False, prior="l2", masks=120, windows=6).decide(whole)
    assert all(len(found[key]) == len(prior[key]) == 24 for key in prior)
    assert loss(found) < loss(prior)
    assert len(notes.lines) == 1 and float(notes.lines[0].rsplit(" ", 1)[1]) > 0.3


def test_rounds_remove_the_same_number_from_every_layer_and_repeat() -> None:
    bonsai = Bonsai(fraction=0.5, step=0.2, masks=10, windows=2, round_to=8)
    first, again = (bonsai.decide(whole_model("llama_gqa")) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert {len(removed) for removed in first.values()} == {1, 48}
    model, rows = pruned("llama_gqa", bonsai)
    assert torch.isfinite(logits(model)).all() and {row.algorithm for row in rows} == {"bonsai"}


def test_a_global_budget_works_in_rounds_too() -> None:
    bonsai = Bonsai(fraction=0.3, step=0.15, masks=10, windows=2, allocation="global", prior="taylor_first")
    groups = unit_groups(map_of("llama_gqa"))
    removed = bonsai.decide(whole_model("llama_gqa"))
    target = 0.3 * sum(group.units * group.parameters for group in groups)
    gone = sum(len(removed[group.name]) * group.parameters for group in groups)
    assert abs(gone - target) <= max(group.parameters for group in groups) / 2
