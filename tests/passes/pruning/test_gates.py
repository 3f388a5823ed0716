"""gates: folding is exact, budgets are kept, shrunk = gated, and every kind learns what it says."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.model.units import unit_groups
from llmcompress.numerics.gates import Budget, cut_through_ranking, hard_concrete, hard_concrete_mean, open_probability
from llmcompress.passes.apply import Compressed, apply_passes
from llmcompress.passes.base import PASSES
from llmcompress.passes.pruning.gate_hooks import fold_gates, gated
from llmcompress.passes.pruning.gate_kinds import KINDS
from llmcompress.passes.pruning.gates import Gates
from tests.families import FAMILIES, tiny_model, tiny_tokens

CPU = torch.device("cpu")
BRIEF = {"steps": 6, "batch": 4, "learning_rate": 1e-3}
ALLOCATION = {"dsa": "global"}
ALIBI = ("bloom", "falcon_old")
"""Heads cannot be removed there, which is found out before the training begins."""


@cache
def map_of(family: str) -> ModelMap:
    return map_model(tiny_model(family))


def whole_model(model: PreTrainedModel, family: str) -> WholeModel:
    return WholeModel(model, map_of(family), RunContext(tiny_tokens(family, batch=6), batch=4, device=CPU))


def make(**options: Any) -> Gates:
    chosen = PASSES["gates"](**{"training": BRIEF, **options})
    assert isinstance(chosen, Gates)
    return chosen


def compressed(family: str, chosen: Gates) -> Compressed:
    return apply_passes(
        tiny_model(family), map_of(family), [chosen], RunContext(tiny_tokens(family, batch=6), batch=4, device=CPU)
    )


def site_parameters(model: PreTrainedModel, names: list[str]) -> int:
    return sum(model.get_submodule(name).weight.numel() for name in names)


@torch.no_grad()
def logits(model: PreTrainedModel, family: str) -> Tensor:
    return model(tiny_tokens(family, seed=3), use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_gates_compute_what_the_gates_did(family: str) -> None:
    model = tiny_model(family)
    groups = unit_groups(map_of(family))
    generator = torch.Generator().manual_seed(0)
    gates = [torch.rand(group.units, generator=generator) * 1.5 for group in groups]
    plain = logits(model, family)
    with gated(model, groups, lambda: gates):
        during = logits(model, family)
    assert torch.equal(logits(model, family), plain), "nothing stays attached"
    fold_gates(whole_model(model, family).sites(), groups, gates)
    torch.testing.assert_close(logits(model, family), during, atol=2e-5 * float(plain.abs().max()), rtol=0)
    if groups:
        assert not torch.allclose(during, plain, atol=1e-2 * float(plain.abs().max()))


@pytest.mark.parametrize("family", ["llama_odd", "gpt2", "opt", "phi3", "falcon", *ALIBI])
def test_the_removed_model_computes_what_the_folded_one_did(family: str) -> None:
    """Everything but the shrinking is repeated by hand; the closed units may be cut off and nothing changes."""
    model, chosen = tiny_model(family), make(kind="slimming", fraction=0.3)
    whole = whole_model(model, family)
    groups = chosen._groups(whole.map)
    if family in ALIBI:
        assert {group.kind for group in groups} == {"channels"}
    if not groups:
        with pytest.raises(CompressError, match="can be removed"):
            chosen.check(whole.map)
        return
    with whole.resident():
        keep = chosen._learn_and_fold(whole, groups)
    result = compressed(family, chosen)
    expected, found = logits(model, family), logits(result.model, family)
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    removed = sum(group.parameters * int((~kept).sum()) for group, kept in zip(groups, keep, strict=True))
    names = [info.full(site.name) for info in map_of(family).blocks for site in info.structure.sites]
    assert site_parameters(tiny_model(family), names) - site_parameters(result.model, names) == removed > 0
    sites = {name for group in groups for name in group.sites}
    assert {row.site for row in result.rows} <= sites and all(row.removed for row in result.rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_every_kind_keeps_the_budget(kind: Any, allocation: Any) -> None:
    """Channels are small, so the share of weights is met within one percent; uniform removes as many in every layer."""
    if kind == "dsa" and allocation == "uniform":
        with pytest.raises(ValidationError, match="global"):
            make(kind=kind)
        return
    chosen = make(kind=kind, allocation=allocation, heads=False, fraction=0.25, floor=0.0)
    groups = chosen._groups(map_of("llama"))
    result = compressed("llama", chosen)
    kept = [result.model.model.layers[index].mlp.down_proj.weight.shape[1] for index in range(3)]
    total = sum(group.units * group.parameters for group in groups)
    removed = sum((group.units - units) * group.parameters for group, units in zip(groups, kept, strict=True))
    assert abs(removed / total - 0.25) < 0.01
    if allocation == "uniform":
        assert kept == [72, 72, 72] and result.model.config.intermediate_size == 72


def test_heads_per_layer_are_as_asked_and_the_config_says_so() -> None:
    result = compressed("llama", make(kind="hard_concrete", channels=False, fraction=0.5))
    assert result.model.config.num_attention_heads == 2 == result.model.config.num_key_value_heads
    assert {row.removed for row in result.rows} == {2} and len(result.rows) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_model(kind: Any) -> None:
    chosen = make(kind=kind, allocation=ALLOCATION.get(kind, "uniform"))
    one, same = (compressed("llama", chosen).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], same[name]) for name in one)


@pytest.mark.parametrize("kind", ["hard_concrete", "slimming", "dsa"])
def test_without_weights_only_gates_are_trained(kind: Any) -> None:
    chosen = make(kind=kind, weights=False, allocation="global", floor=0.0)
    model = tiny_model("llama")
    whole = whole_model(model, "llama")
    groups = chosen._groups(whole.map)
    with whole.resident():
        chosen._learn_and_fold(whole, groups)
    readers = {f"{name}.weight" for group in groups for name in group.readers}
    for (name, after), before in zip(model.named_parameters(), tiny_model("llama").parameters(), strict=True):
        assert torch.equal(after, before) or name in readers, name


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_do_nothing_are_the_first_to_go(kind: Any) -> None:
    """Half of the channels of every layer have no weight in down_proj; group_lasso also sees their other weights."""
    model = tiny_model("llama")
    dead = torch.arange(0, 96, 2)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, dead] *= 1e-3
        if kind in ("group_lasso", "slimming", "hard_concrete"):
            layer.mlp.up_proj.weight.data[dead] *= 1e-3
            layer.mlp.gate_proj.weight.data[dead] *= 1e-3
    chosen = make(
        kind=kind, heads=False, fraction=0.4, allocation=ALLOCATION.get(kind, "uniform"), floor=0.0,
        training={**BRIEF, "steps": 24, "learning_rate": 1e-5},
    )  # fmt: skip
    whole = whole_model(model, "llama")
    groups = chosen._groups(whole.map)
    with whole.resident():
        keep = chosen._learn_and_fold(whole, groups)
    gone = torch.stack([~kept for kept in keep])
    # by chance half of them would be
    assert float(gone[:, dead].sum() / gone.sum()) > (0.9 if kind in ("group_lasso", "dsa", "decorator") else 0.6)


def test_hard_concrete_gates_are_zero_as_often_as_their_probability_says() -> None:
    openness = torch.tensor([-4.0, -1.0, 0.0, 1.0, 4.0])
    uniform = torch.rand(200_000, 1, generator=torch.Generator().manual_seed(0))
    gates = hard_concrete(openness, uniform)
    assert float(gates.min()) == 0.0 and float(gates.max()) == 1.0
    torch.testing.assert_close((gates > 0).float().mean(0), open_probability(openness), atol=5e-3, rtol=0)
    assert (hard_concrete_mean(openness).diff() > 0).all()


def test_the_soft_cut_keeps_its_share_and_the_most_important() -> None:
    importance = torch.rand(200, generator=torch.Generator().manual_seed(0))
    for share in (0.2, 0.5, 0.8):
        kept = torch.tensor(share, requires_grad=True)
        gates = cut_through_ranking(importance, kept, 0.02)
        assert float(gates.detach().mean()) == pytest.approx(share, abs=0.01)
        assert float(gates.detach()[importance.argmax()]) > 0.99 and float(gates.detach()[importance.argmin()]) < 0.01
        gates.mean().backward()
        assert float(kept.grad) == pytest.approx(1.0, abs=0.05)  # type: ignore[arg-type]


def test_the_budget_pushes_until_the_target_is_met() -> None:
    share = torch.zeros(2, requires_grad=True)
    budget = Budget([0.3, 0.6], ramp_steps=50, rate=0.5, quadratic=5.0)
    optimizer = torch.optim.SGD([share], lr=0.1)
    for step in range(1, 400):
        # something that wants the shares to be zero
        (share.sum() + budget.penalty(list(share), step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(share.detach(), torch.tensor([0.3, 0.6]), atol=5e-3, rtol=0)


def test_options_that_would_do_nothing_are_refused() -> None:
    for options in (
        {"kind": "decorator", "strength": 1.0},
        {"kind": "group_lasso", "weights": False},
        {"kind": "group_lasso", "gate_learning_rate": 0.1},
    ):
        with pytest.raises(ValidationError):
            make(**options)
