"""Passes that zero single weights, and what later passes make of the zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.model.site import LinearSite
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.numerics.masks import count_of_zeros
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES, Pass
from llmcompress.passes.pruning.sparse import SparsePass, magnitude_mask
from llmcompress.recipe import parse_recipe
from llmcompress.records.rows import SiteReport
from llmcompress.sensitivity.gradients import squared_gradients
from tests.families import VOCABULARY, tiny_model

FAMILIES = ("llama_gqa", "gpt2", "qwen3_moe")
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("magnitude", {"sparsity": 0.37}),
    ("magnitude", {"comparison": "row"}),
    ("magnitude", {"pattern": "2:4"}),
    ("wanda", {"sparsity": 0.61}),
    ("wanda", {"sparsity": 0.61, "comparison": "layer"}),
    ("wanda", {"pattern": "4:8"}),
    ("sparsegpt", {"sparsity": 0.61}),
    ("sparsegpt", {"pattern": "2:4", "block": 13}),
]
QUANTIZERS: list[tuple[tuple[str, dict[str, Any]], ...]] = [
    (("rtn", {"scheme": "int4_g32_asym"}),),
    (("gptq", {"scheme": "int3_g32_asym"}),),
    (("gptq", {"scheme": "int4_g16", "act_order": False, "true_sequential": True}),),
    (("awq", {"scheme": "int3_g32_asym", "points": 4}),),
    (("awq", {"round": False, "points": 4}), ("gptq", {"scheme": "int4_channel"})),
    (("smoothquant", {}), ("gptq", {"scheme": "int8_channel_a8tensor"})),
    (("wanda", {"pattern": "2:4"}),),
    (("sparsegpt", {"sparsity": 0.6, "scheme": "int4_g32"}),),
]

_maps: dict[str, ModelMap] = {}


def map_of(family: str) -> ModelMap:
    if family not in _maps:
        _maps[family] = map_model(tiny_model(family, seed=1))
    return _maps[family]


def windows(count: int = 6, tokens: int = 24) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(0))


def make(name: str, options: Mapping[str, Any]) -> Pass:
    padded = {"on_indivisible": "pad"} if "on_indivisible" in PASSES[name].model_fields else {}
    return PASSES[name](**{**padded, **options})


def compressed(family: str, *passes: Pass, dtype: torch.dtype = torch.float32) -> tuple[Any, list[SiteReport]]:
    return apply_passes(
        tiny_model(family, seed=1),
        map_of(family),
        passes,
        RunContext(windows(), batch=4, storage_dtype=dtype),
    )


def whole_model(family: str) -> WholeModel:
    return WholeModel(
        tiny_model(family, seed=1),
        map_of(family),
        RunContext(windows(), batch=4),
    )


def weight_at(model: nn.Module, site: str) -> Tensor:
    """Outputs × inputs, also for the transposed linears of GPT-2."""
    module = model.get_submodule(site)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if type(module).__name__ == "Conv1D" else weight


def share_of_zeros(model: nn.Module, sites: tuple[str, ...]) -> tuple[int, int]:
    weights = [weight_at(model, site) for site in sites]
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "options"), METHODS, ids=str)
def test_every_site_loses_exactly_its_share_and_the_report_says_so(
    family: str, name: str, options: dict[str, Any]
) -> None:
    each = make(name, options)
    assert isinstance(each, SparsePass)
    model, rows = compressed(family, each)
    again, rows_again = compressed(family, each)
    assert rows == rows_again
    assert {row.site for row in rows} == set(map_of(family).site_names())
    for row in rows:
        weight = weight_at(model, row.site)
        assert torch.equal(weight, weight_at(again, row.site))
        assert int((weight == 0).sum()) == count_of_zeros(each.target, weight.numel())
        assert row.sparsity == int((weight == 0).sum()) / weight.numel()
        if each.zeros:
            groups = (weight == 0).reshape(len(weight), -1, each.zeros.of)
            assert (groups.sum(-1) == each.zeros.zeros).all()
        if name == "sparsegpt" and row.error is not None and row.error_before is not None:
            assert row.error <= row.error_before
    assert torch.isfinite(model(windows()).logits).all()


def test_wanda_over_a_whole_site_drops_its_lowest_scores() -> None:
    """Rows of small weights lose all of them; row by row every row loses half."""
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    squares = torch.tensor([1.0, 1.0, 1.0, 4.0])
    over, by_row = (PASSES["wanda"](comparison=each) for each in ("layer", "row"))
    assert isinstance(over, SparsePass) and isinstance(by_row, SparsePass)
    assert over.mask(weight, squares, 0.5).tolist() == [[True] * 4, [False] * 4]
    assert by_row.mask(weight, squares, 0.5).tolist() == [[True, True, False, False]] * 2


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_no_sparsity_changes_nothing(name: str) -> None:
    model, rows = compressed("llama_gqa", make(name, {"sparsity": 0.0}))
    before = tiny_model("llama_gqa", seed=1).state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert {row.sparsity for row in rows} == {0.0} and {row.error for row in rows} <= {None, 0.0}


@pytest.mark.parametrize("family", ["llama_gqa", "opt"])
@pytest.mark.parametrize("later", QUANTIZERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_zero_stays_zero_in_every_later_pass(
    family: str, later: tuple[tuple[str, dict[str, Any]], ...], dtype: torch.dtype
) -> None:
    masked, _ = compressed(family, make("magnitude", {}), dtype=dtype)
    model, _ = compressed(family, make("magnitude", {}), *(make(*each) for each in later), dtype=dtype)
    for site in map_of(family).site_names():
        zeros = weight_at(masked, site) == 0
        assert zeros.float().mean() == 0.5
        assert (weight_at(model, site)[zeros] == 0).all(), site
        assert (weight_at(model, site)[~zeros] != 0).any(), site


@pytest.mark.parametrize("scheme", ["int4_g32", "int3_channel_asym", "int8_g16_a8tensor"])
@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=str)
def test_sparsegpt_with_a_scheme_leaves_codes_with_exact_zeros(scheme: str, options: dict[str, Any]) -> None:
    each = make("sparsegpt", {**options, "scheme": scheme})
    assert each.quantizes() and "zeros" in each.traits()
    model, rows = compressed("llama_gqa", each)
    for row in rows:
        assert isinstance(model.get_submodule(row.site), QuantLinear)
        assert row.scheme == scheme and row.sparsity is not None and row.sparsity >= 0.5
        zeros = (weight_at(model, row.site) == 0).view(-1, 4).sum(1)
        assert zeros.min() >= 2 if "pattern" in options else zeros.sum() >= 2 * len(zeros)
        assert row.error is not None and row.error_before is not None and row.error <= row.error_before


def test_sparsegpt_repairs_what_its_mask_breaks() -> None:
    """On the very inputs it was measured on, the whole output is nearer than with the mask alone."""
    model, rows = compressed("llama_gqa", make("sparsegpt", {}))
    mask_alone, rows_alone = compressed("llama_gqa", make("magnitude", {}))
    dense = tiny_model("llama_gqa", seed=1)(windows()).logits
    errors = [(each(windows()).logits - dense).square().mean() for each in (model, mask_alone)]
    assert errors[0] < errors[1]
    assert not [row for row in (*rows, *rows_alone) if row.degraded]


def test_a_repair_that_ends_worse_is_undone_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(weight_OI: Tensor, *args: object, **kwargs: object) -> Tensor:
        return torch.where(sweep(weight_OI, *args, **kwargs) == 0, 0.0, 100.0)

    from llmcompress.passes.pruning import sparsegpt

    sweep: Any = sparsegpt.sweep_columns
    monkeypatch.setattr(sparsegpt, "sweep_columns", spoil)
    _, rows = compressed("llama_gqa", make("sparsegpt", {}))
    for row in rows:
        assert row.degraded and ("did not help" in row.degraded or "did worse" in row.degraded) and row.sparsity == 0.5
        assert row.error is not None and row.error_before is not None and row.error <= row.error_before < 1


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_a_site_that_no_token_reached_is_pruned_by_magnitude_and_reported(name: str) -> None:
    """As experts are that the router never chose."""
    each, whole = make(name, {}), whole_model("llama_gqa")
    assert isinstance(each, SparsePass)
    block = next(whole.stream())
    for site in block.sites:
        site.set_statistics({kind: kind(site.info.inputs, whole.context.device) for kind in each.needs()})
    rows = each.apply(block, block.sites)
    by_magnitude, _ = compressed("llama_gqa", make("magnitude", {}))
    for row in rows:
        assert row.tokens == 0 and row.sparsity == 0.5 and row.degraded and "no tokens" in row.degraded
        assert torch.equal(weight_at(whole.model, row.site), weight_at(by_magnitude, row.site))


def test_one_threshold_for_all_sites_drops_the_smallest_of_all() -> None:
    model, _ = compressed("llama_gqa", make("magnitude", {"sparsity": 0.4, "comparison": "global"}))
    sites = map_of("llama_gqa").site_names()
    dense = torch.cat([weight_at(tiny_model("llama_gqa", seed=1), site).flatten() for site in sites]).abs()
    kept = torch.cat([weight_at(model, site).flatten() for site in sites]) != 0
    assert int((~kept).sum()) == count_of_zeros(0.4, dense.numel())
    assert dense[~kept].max() <= dense[kept].min()
    assert len({share_of_zeros(model, (site,)) for site in sites}) > 3


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("allocation", ["outliers", "loss"])
def test_an_allocation_moves_shares_within_bounds_and_meets_the_target_exactly(name: str, allocation: str) -> None:
    own = "*.layers.1.mlp.down_proj"
    options = {"sparsity": 0.6, "allocation": allocation, "within": 0.1, "overrides": {own: {"sparsity": 0.25}}}
    each = make(name, options)
    assert each.uses_data()
    model, rows = compressed("llama_gqa", each)
    shared = tuple(row.site for row in rows if "layers.1.mlp.down_proj" not in row.site)
    zeros, weights = share_of_zeros(model, shared)
    assert zeros == count_of_zeros(0.6, weights)
    found = {row.site: row.sparsity for row in rows}
    assert len(set(found.values())) > 2
    assert all(abs((found[site] or 0.0) - 0.6) < 0.1 + 1e-3 for site in shared)
    assert found["model.layers.1.mlp.down_proj"] == 0.25
    if allocation == "outliers":
        blocks = [{round(found[site] or 0.0, 2) for site in shared if f"layers.{index}." in site} for index in range(3)]
        assert all(max(shares) - min(shares) <= 0.011 for shares in blocks)


def test_a_budget_by_loss_takes_from_where_the_loss_feels_it_least() -> None:
    """On the dense model, where it is decided: masks of its counts cost less loss than those of equal shares."""
    each = make("magnitude", {"sparsity": 0.3, "allocation": "loss", "within": 0.3})
    assert isinstance(each, SparsePass)
    whole = whole_model("llama_gqa")
    shares = {site: float(share) for site, share in each.decide(whole).items()}
    weights = {site.name: site.info.outputs * site.info.inputs for site in whole.sites()}
    counts = {name: round(share * weights[name]) for name, share in shares.items()}
    assert sum(counts.values()) == count_of_zeros(0.3, sum(weights.values()))
    growth = {"uniform": 0.0, "decided": 0.0}
    for name, gradient in squared_gradients(whole, list(weights)).items():
        site = next(site for site in whole.sites() if site.name == name)
        for label, share in (("uniform", 0.3), ("decided", shares[name])):
            growth[label] += float(lost_output(whole, site, share) @ gradient)
    assert growth["decided"] < 0.95 * growth["uniform"]


def lost_output(whole: WholeModel, site: LinearSite, share: float) -> Tensor:
    """Per output: the squared sum of what the smallest weights gave, over all tokens, by running the dense model."""
    mask = magnitude_mask(site.weight_OI, share, None)
    lost: list[Tensor] = []
    handle = site.module.register_forward_pre_hook(
        lambda _, args: lost.append((args[0].reshape(-1, site.info.inputs) @ (site.weight_OI * mask).T).square().sum(0))
    )
    with torch.no_grad():
        whole.model(windows())
    handle.remove()
    return torch.stack(lost).sum(0)


def test_overrides_give_some_sites_another_share_or_pattern() -> None:
    model, rows = compressed(
        "llama_gqa",
        make(
            "wanda",
            {"overrides": {"*.q_proj": {"sparsity": 0.25}, "*.mlp.*": {"pattern": "1:4"}}, "exclude": ["*.o_proj"]},
        ),
    )
    found = {row.site.rsplit(".", 1)[1]: row.sparsity for row in rows}
    half, quarter = ("k_proj", "v_proj"), ("q_proj", "gate_proj", "up_proj", "down_proj")
    assert found == dict.fromkeys(half, 0.5) | dict.fromkeys(quarter, 0.25)
    groups = (weight_at(model, "model.layers.0.mlp.up_proj") == 0).view(-1, 4).sum(1)
    assert (groups == 1).all()


def test_widths_that_no_pattern_fits_are_refused_before_any_work_with_every_way_out() -> None:
    each = make("magnitude", {"pattern": "2:4", "exclude": ["*.o_proj"]})
    with pytest.raises(CompressError) as found:
        each.check(map_of("llama_odd"))
    error = found.value
    assert error.code == "sparsity.indivisible" and "18 sites" in error.what
    assert "model.layers.*.mlp.down_proj: 75 inputs, 2:4" in error.where
    assert '"*.down_proj"' in error.fix and "pattern: unstructured" in error.fix
    make("magnitude", {"pattern": "1:3", "exclude": ["*.o_proj"]}).check(map_of("llama_odd"))
    only_even = make("magnitude", {"pattern": "2:4", "exclude": ["*.down_proj"]})
    with pytest.raises(CompressError, match="do not divide") as found:
        compressed("llama_odd", only_even)
    assert "`pattern: 1:2`" in found.value.fix
    with pytest.raises(CompressError, match="scheme"):
        PASSES["sparsegpt"](scheme="int4_g128").check(map_of("llama_odd"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("{pattern: 2:4, sparsity: 0.6}", "fixes `sparsity`"),
        ("{pattern: 2:4, allocation: outliers}", "must be uniform"),
        ("{outlier_times: 3}", "applies to `allocation: outliers`"),
        ("{within: 0.1}", "applies to `allocation"),
        ("{pattern: 4:2}", "not a sparsity pattern"),
        ("{sparsity: 1.0}", "sparsity"),
        ("{comparison: global, allocation: loss}", "must be uniform"),
        ("{comparison: row, pattern: 2:4}", "remove `comparison`"),
        ('{overrides: {"*.q_proj": {allocation: loss}}}', "allocation"),
    ],
)
def test_options_that_contradict_are_refused_with_their_line(options: str, said: str) -> None:
    with pytest.raises(CompressError, match=said) as found:
        parse_recipe(f"model: builtin:books-llama\npasses:\n  - magnitude: {options}\n", "recipe.yaml")
    assert "line 3" in found.value.where


def test_a_pattern_needs_no_quotes_in_yaml() -> None:
    recipe = parse_recipe("model: builtin:books-llama\npasses:\n  - wanda: {pattern: 2:4}\n", "recipe.yaml")
    (each,) = recipe.passes
    assert isinstance(each, SparsePass) and each.pattern == "2:4" and "pattern" in each.traits()


def test_wanda_by_layer_and_a_pattern_contradict() -> None:
    with pytest.raises(CompressError, match="remove `comparison`"):
        parse_recipe("model: m\npasses:\n  - wanda: {pattern: 2:4, comparison: layer}\n", "recipe.yaml")


def test_pruning_after_rounding_is_refused_and_before_it_is_not() -> None:
    late = "model: builtin:books-llama\npasses:\n  - rtn: {scheme: int4_g32}\n  - wanda: {sparsity: 0.5}\n"
    with pytest.raises(CompressError, match="already quantized"):
        parse_recipe(late, "recipe.yaml")
    parse_recipe("model: builtin:books-llama\npasses:\n  - wanda\n  - gptq: {scheme: int4_g32}\n", "recipe.yaml")
