"""Width pruning on every family: pruned equals masked, counts are what the formula says, choices follow the scores."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.model.units import UnitGroup, masked, unit_groups
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.pruning.bonsai import Bonsai
from llmcompress.passes.pruning.scores.base import SCORES
from llmcompress.passes.pruning.width import Width, WidthPass
from llmcompress.records.rows import SiteReport
from tests.families import FAMILIES, VOCABULARY, tiny_model

ALL_HEADS_NEEDED = frozenset({"falcon_old", "bloom"})
"""Their attention biases are made for all heads outside of the blocks."""


@cache
def map_of(family: str) -> ModelMap:
    return map_model(tiny_model(family, seed=1))


def windows(seed: int = 0, count: int = 6, tokens: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, tokens), generator=generator)


def whole_model(family: str, model: PreTrainedModel | None = None, data: Tensor | None = None) -> WholeModel:
    return WholeModel(
        model or tiny_model(family, seed=1),
        map_of(family),
        RunContext(windows() if data is None else data, batch=4),
    )


def pruned(family: str, pass_: WidthPass, model: PreTrainedModel | None = None) -> tuple[Any, list[SiteReport]]:
    return apply_passes(
        model or tiny_model(family, seed=1),
        map_of(family),
        (pass_,),
        RunContext(windows(), batch=4),
    )


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(windows(seed=9, count=2)).logits.double()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def masks(groups: list[UnitGroup], decisions: dict[str, Tensor]) -> list[Tensor]:
    return [torch.zeros(group.units).index_fill(0, kept(group, decisions), 1.0) for group in groups]


def kept(group: UnitGroup, decisions: dict[str, Tensor]) -> Tensor:
    gone = set(decisions[group.name].tolist()) if group.name in decisions else set()
    return torch.tensor(sorted(set(range(group.units)) - gone))


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_is_masked_and_the_count_is_the_formula(family: str) -> None:
    width = Width(fraction=0.4, score="l2", refit="none")
    dense = tiny_model(family, seed=1)
    groups = unit_groups(map_of(family))
    decisions = width.decide(whole_model(family))
    if family in ALL_HEADS_NEEDED:
        assert {group.kind for group in groups if group.name in decisions} == {"channels"}
    with masked(dense, groups, masks(groups, decisions)):
        expected = logits(dense)
    small, rows = pruned(family, width)
    assert decisions and rows
    torch.testing.assert_close(logits(small), expected, atol=2e-4 * float(expected.abs().max()), rtol=0)
    gone = 0
    for group in groups:
        removed = set(range(group.units)) - set(kept(group, decisions).tolist())
        for part in group.parts:
            site = group.block.structure.site(part.site)
            across = site.inputs + site.has_bias if part.axis == "rows" else site.outputs
            inner = sum(len(part.indices[unit]) for unit in removed)
            # rows and columns of one site never both belong to units here
            gone += inner * across
    assert parameters(small) == parameters(dense) - gone
    generated = small.generate(windows(count=1, tokens=5), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 9)


@pytest.mark.parametrize("family", sorted(ALL_HEADS_NEEDED))
def test_heads_that_the_model_counts_stay_and_the_plan_says_so(family: str) -> None:
    (note,) = Width(fraction=0.25).notes(map_of(family))
    assert "heads stay" in note and not Width(fraction=0.25, heads=False).notes(map_of(family))
    with pytest.raises(CompressError, match=r"width\.nothing-to-remove"):
        Width(channels=False).check(map_of(family))
    heads = next(group for group in unit_groups(map_of(family)) if group.kind == "heads")
    with pytest.raises(CompressError, match=r"width\.fixed-heads"):
        Width(overrides={heads.name: {"removed": "0"}}).check(map_of(family))


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "phi3", "opt", "mixtral"])
def test_nothing_to_remove_leaves_every_bit(family: str) -> None:
    before = tiny_model(family, seed=1).state_dict()
    for pass_ in (Width(fraction=0.0), Width(fraction=0.0, allocation="global", score="fisher"), Bonsai(fraction=0.0)):
        model, rows = pruned(family, pass_)
        assert not rows
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[key]), key


def test_the_description_names_every_score() -> None:
    described = Width.model_fields["score"].description
    assert described is not None and set(described.partition(";")[0].split(", ")) == set(SCORES)


@pytest.mark.parametrize("score", list(SCORES))
def test_every_score_is_deterministic_and_keeps_the_count(score: str) -> None:
    width = Width(fraction=0.3, score=score, channels=True)
    first, again = (width.decide(whole_model("llama_gqa")) for _ in range(2))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    # 1 of 2 KV groups is nearest to 0.3: 6,144 of the 9,216 weights that 0.3 of a block are; 16 channels have the rest
    assert {len(removed) for removed in first.values()} == {1, 16}
    model, rows = pruned("llama_gqa", width)
    assert model.config.intermediate_size == 96 - 16 and model.config.num_key_value_heads == 1
    assert model.config.num_attention_heads == 2 and model.config.head_dim == 16
    for row in rows:
        if row.error is not None and row.error_before is not None:
            assert row.error <= row.error_before * (1 + 1e-9)
    assert {row.site.rsplit(".", 1)[1] for row in rows if row.error is not None} == {"o_proj", "down_proj"}


@pytest.mark.parametrize(
    ("family", "score"),
    [
        ("gpt2", "taylor_second"),
        ("gpt2", "lasso"),
        ("phi3", "fluctuation"),
        ("falcon", "uniqueness"),
        ("mixtral", "taylor_first"),
        ("mixtral", "group_fisher"),
        ("llama_odd", "fisher"),
    ],
)
def test_scores_and_refits_run_on_conv1d_fused_and_routed_linears(family: str, score: str) -> None:
    model, rows = pruned(family, Width(fraction=0.5, score=score, damping=0.1))
    assert rows and torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("refit", ["columns", "scales", "bias", "none"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_refits_never_raise_the_error_of_a_reader(family: str, refit: Any) -> None:
    model, rows = pruned(family, Width(fraction=0.5, score="random", refit=refit))
    readers = [row for row in rows if row.error is not None]
    assert bool(readers) == (refit != "none")
    for row in readers:
        assert row.error is not None and row.error_before is not None and row.error <= row.error_before * (1 + 1e-9)
    assert torch.isfinite(logits(model)).all()
    if family == "llama":
        has_bias = model.get_submodule("model.layers.0.mlp.down_proj").bias is not None
        assert has_bias == (refit == "bias")


def test_a_refit_of_duplicated_channels_is_exact() -> None:
    """The other half of the FFN only repeats the first: removing it loses nothing."""
    model = tiny_model("llama", seed=1)
    for layer in model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.data[48:] = linear.weight.data[:48]
    dense = logits(model)
    small, rows = pruned("llama", Width(fraction=0.5, heads=False, score="uniqueness", damping=1e-8), model)
    torch.testing.assert_close(logits(small), dense, atol=2e-3 * float(dense.abs().max()), rtol=0)
    assert all(row.removed == 48 for row in rows)


def test_heads_and_channels_can_be_left_alone_and_unselected_sites_stay() -> None:
    before = tiny_model("llama_gqa", seed=1).state_dict()
    for options, touched in [
        ({"heads": False}, "mlp"),
        ({"channels": False}, "self_attn"),
        ({"sites": "*.mlp.*", "exclude": "*.layers.0.*"}, "mlp"),
        ({"overrides": {"*.layers.0.*": {"fraction": 0.0}}, "heads": False}, "mlp"),
    ]:
        model, rows = pruned("llama_gqa", Width(fraction=0.5, score="l1", **options))
        assert all(touched in row.site for row in rows)
        spared = "exclude" in options or "overrides" in options
        assert spared != any(".layers.0." in row.site for row in rows)
        for key, tensor in model.state_dict().items():
            if touched not in key or (spared and ".layers.0." in key):
                assert torch.equal(tensor, before[key]), key


def test_what_cannot_be_pruned_is_refused_before_any_work() -> None:
    with pytest.raises(CompressError) as caught:
        Width(channels=False).check(map_of("falcon_mqa"))
    assert caught.value.code == "width.nothing-to-remove"
    with pytest.raises(CompressError):
        Width(sites=("*.q_proj",)).check(map_of("llama"))
    with pytest.raises(CompressError, match="rounds to no units"):
        Width(fraction=0.1, heads=False, round_to=48).check(map_of("llama"))
    Width(fraction=0.0).check(map_of("llama"))
    with pytest.raises(ValueError, match="did you mean `taylor_first`"):
        Width(score="taylor_frist")
    assert Width().conflict_with("pattern") and Width().conflict_with("codes") and not Width().conflict_with("zeros")


def test_exact_zeros_stay_exact_zeros_through_a_refit() -> None:
    model = tiny_model("llama", seed=1)
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight.data
        weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    zeros = [layer.mlp.down_proj.weight.data == 0 for layer in model.model.layers]
    width = Width(fraction=0.25, heads=False, score="l2")
    decisions = width.decide(whole_model("llama", model))
    small, _ = pruned("llama", width, model)
    for index, (layer, was) in enumerate(zip(small.model.layers, zeros, strict=True)):
        (group,) = [g for g in unit_groups(map_of("llama")) if g.block.index == index and g.name in decisions]
        assert (layer.mlp.down_proj.weight[was[:, kept(group, decisions)]] == 0).all()


def test_mask_gradients_are_the_slope_of_the_loss() -> None:
    """`taylor_vector` sums w·g over the columns of the reader: the same slope, by way of the weights."""
    family = "llama"
    whole = whole_model(family, data=windows(count=1))
    groups = [group for group in unit_groups(map_of(family)) if group.kind == "heads"][:2]
    fisher = [row.loss_C for row in SCORES["group_fisher"](groups).measured(whole).rows]
    model = whole.model.double()
    ids = whole.context.windows_NT

    def loss_without(group: UnitGroup, unit: int, step: float) -> float:
        mask = torch.ones(group.units, dtype=torch.float64)
        mask[unit] += step
        with torch.no_grad(), masked(model, [group], [mask]):
            out = model(ids).logits[:, :-1]
        return float(nn.functional.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten()))

    for group, squared_U in zip(groups, fisher, strict=True):
        slopes = [(loss_without(group, u, 0.01) - loss_without(group, u, -0.01)) / 0.02 for u in range(group.units)]
        torch.testing.assert_close(squared_U.double(), torch.tensor(slopes).double().square(), rtol=2e-2, atol=1e-7)


def test_norms_are_those_of_all_rows_and_columns_of_a_unit() -> None:
    model = tiny_model("llama_gqa", seed=1)
    groups = unit_groups(map_of("llama_gqa"))
    tables = (SCORES[name](groups).measured(whole_model("llama_gqa")) for name in ("l2", "l1"))
    l2, l1 = ([row.loss_C.float() for row in table.rows] for table in tables)
    mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn
    channel = torch.cat([mlp.gate_proj.weight[7], mlp.up_proj.weight[7], mlp.down_proj.weight[:, 7]])
    head = [attention.q_proj.weight[32:], attention.k_proj.weight[16:], attention.v_proj.weight[16:]]
    head.append(attention.o_proj.weight[:, 32:])
    at = {group.kind: index for index, group in enumerate(groups) if group.block.index == 1}
    torch.testing.assert_close(l2[at["channels"]][7], channel.square().sum())
    torch.testing.assert_close(l1[at["heads"]][1], torch.stack([part.abs().sum() for part in head]).sum())


def test_unique_units_are_less_alike_than_the_largest_ones() -> None:
    family = "llama"
    model = tiny_model(family, seed=1)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[:32] = 3 * linear.weight[32:64] + 0.01 * linear.weight[:32]
    groups = [group for group in unit_groups(map_of(family)) if group.kind == "channels"]

    def likeness(score: str) -> float:
        decisions = Width(fraction=0.3, heads=False, score=score).decide(whole_model(family, model))
        total = 0.0
        with ExitStack() as stack:
            seen: dict[str, Tensor] = {}
            for group in groups:
                stack.callback(
                    model.get_submodule(group.readers[0])
                    .register_forward_pre_hook(
                        lambda _, args, key=group.name: seen.update({key: args[0].flatten(0, 1)})
                    )
                    .remove
                )
            logits(model)
        for group in groups:
            x = nn.functional.normalize(seen[group.name][:, kept(group, decisions)], dim=0)
            total += float((x.T @ x).abs().mean())
        return total

    assert likeness("uniqueness") < likeness("l2")


@pytest.mark.parametrize("fraction", [0.1, 0.35, 0.5])
@pytest.mark.parametrize("multiple", [1, 8])
def test_a_global_budget_is_met_with_floors_and_multiples(fraction: float, multiple: int) -> None:
    family = "mistral"
    width = Width(fraction=fraction, score="taylor_first", allocation="global", floor=0.25, round_to=multiple)
    groups = unit_groups(map_of(family))
    decisions = width.decide(whole_model(family))
    target = fraction * sum(group.units * group.parameters for group in groups)
    gone = sum(len(decisions[group.name]) * group.parameters for group in groups)
    finest = multiple * min(group.parameters for group in groups)
    assert abs(gone - target) <= finest / 2 + 1e-6
    for group in groups:
        left = group.units - len(decisions[group.name])
        assert left >= 0.25 * group.units
        assert group.kind == "heads" or left % multiple == 0
    model, _ = pruned(family, width)
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize(
    ("removed", "reason"), [("0-95", "one must stay"), ("3, 96", "0 to 95")], ids=["all", "not there"]
)
def test_units_that_cannot_go_are_refused(removed: str, reason: str) -> None:
    width = Width(fraction=0, overrides={"*.down_proj": {"removed": removed}})
    with pytest.raises(CompressError, match=reason):
        width.check(map_of("llama"))


@pytest.mark.parametrize(("round_to", "left"), [(1, 72), (16, 80), (32, 64), (64, 64), (128, 96)])
def test_kept_channels_are_rounded_to_the_nearest_multiple(round_to: int, left: int) -> None:
    decisions = Width(fraction=0.25, heads=False, score="l2", refit="none", round_to=round_to).decide(
        whole_model("llama")
    )
    assert {96 - len(removed) for removed in decisions.values()} == ({left} if left < 96 else set())
