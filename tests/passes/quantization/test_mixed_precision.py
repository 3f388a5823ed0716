"""Bits decided per site: the average asked for, ordinary overrides, the same result again."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from llmcompress import compress
from llmcompress.errors import CompressError
from llmcompress.evaluation.footprint import ideal_bytes
from llmcompress.modules.scheme import named_scheme
from llmcompress.passes.quantization.mixed_precision import MixedPrecision
from llmcompress.passes.quantization.sensitivity import hessian, rounding_losses
from llmcompress.recipe import parse_recipe
from tests.families import FAMILIES
from tests.passes.decomposition.factored import block_pass, compressed, logits, map_of, whole_model, windows
from tests.sensitivity.kept import KeptMeasurements

SCHEMES = ("int2_g32", "int3_g32", "int4_g32", "int8_g32")
MEASURES = ("gradients", "rate", "fisher", "hessian", "kl", "output")


def mixed(**options: Any) -> MixedPrecision:
    given = {"schemes": SCHEMES, "bits": 4.5, "quantizer": {"rtn": {"on_indivisible": "pad"}}, "samples": 2, **options}
    made = block_pass("mixed_precision", **given)
    assert isinstance(made, MixedPrecision)
    return made


def average(rows: list[Any], model: nn.Module) -> float:
    sizes = {row.site: model.get_submodule(row.site).dense_weight().numel() for row in rows}
    return sum(row.bits_per_weight * sizes[row.site] for row in rows) / sum(sizes.values())


def reachable(family: str, *, per_group: bool) -> set[int]:
    """All sums of bits that the sites of a family can have together, found by adding site after site."""
    sums = {0}
    grids = [named_scheme(name).weights for name in SCHEMES]
    for block in map_of(family).blocks:
        groups = [group.sites if per_group else (name,) for group in block.structure.groups for name in group.sites]
        for group in dict.fromkeys(groups):
            sites = [block.structure.site(name) for name in group]
            own = {
                sum(
                    grid.bits * site.outputs * site.inputs + grid.scale_bits(site.outputs, site.inputs, 32)
                    for site in sites
                )
                for grid in grids
            }
            sums = {before + each for before in sums for each in own}
    return sums


@pytest.mark.parametrize(
    ("family", "per"), [*((family, "group") for family in FAMILIES), ("llama_gqa", "site"), ("gpt2", "site")]
)
def test_on_every_family_the_average_is_met_where_sizes_allow_and_overrides_do_the_same(family: str, per: str) -> None:
    decided = mixed(per=per)
    model, rows = compressed(family, decided)
    assert {row.site for row in rows} == set(map_of(family).site_names())
    weights = sum(model.get_submodule(row.site).dense_weight().numel() for row in rows)
    possible = [total / weights for total in reachable(family, per_group=per == "group") if total <= 4.5 * weights]
    found = average(rows, model)
    assert found <= 4.5 + 1e-9
    assert found >= 4.49 - 1e-9 or max(possible) < 4.49
    decisions = decided.decide(whole_model(family))
    settled = decided.with_decisions(decisions)
    assert {"scheme"} == {key for each in settled.overrides.values() for key in each}
    again, rows_again = compressed(family, settled)
    assert rows == rows_again
    assert torch.equal(logits(model), logits(again))
    if per == "group":
        for block in map_of(family).blocks:
            for group in block.structure.groups:
                assert len({int(decisions[block.full(name)]) for name in group.sites}) == 1


@pytest.mark.parametrize("samples", [2, 6])
def test_the_decision_looks_at_as_many_windows_as_it_says(samples: int) -> None:
    """Windows behind those change nothing of what is measured, and windows among them do."""
    tables = []
    for changed in (False, True):
        data = windows()
        if changed:
            data[3:] = windows(seed=7)[3:]
        keep = KeptMeasurements()
        whole = whole_model("llama")
        context = replace(whole.context.at("00"), windows_NT=data, keep=keep)  # type: ignore[arg-type]
        mixed(samples=samples).decide(whole.within(context))
        ((tensors, _),) = keep.files.values()
        tables.append(torch.cat([tensors[name] for name in sorted(tensors) if name.endswith("loss")]))
    assert torch.equal(*tables) == (samples == 2)


def test_sites_that_share_an_input_may_be_freed() -> None:
    schemes: dict[str, set[int]] = {}
    for per in ("group", "site"):
        decisions = mixed(per=per).decide(whole_model("llama_gqa"))
        attention = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
        schemes[per] = {int(decisions[name]) for name in attention}
    assert len(schemes["group"]) == 1 < len(schemes["site"])


def test_sites_with_candidates_of_their_own_are_decided_apart() -> None:
    decisions = mixed(overrides={"*.k_proj": {"schemes": ["int8_g32"]}}).decide(whole_model("llama_gqa"))
    own = {name: int(index) for name, index in decisions.items() if name.endswith("k_proj")}
    assert set(own.values()) == {0}
    joined = [int(decisions[f"model.layers.0.self_attn.{name}_proj"]) for name in "qv"]
    assert len(set(joined)) == 1


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("family", ["llama_gqa", "gpt2"])
def test_every_measure_leaves_the_model_as_it_was_and_fewer_bits_cost_more(family: str, measure: Any) -> None:
    whole = whole_model(family)
    dense = logits(whole.model)
    candidates = {
        site.name: [named_scheme(name) for name in SCHEMES] for site in whole.sites() if "0" in site.name.split(".")
    }
    table = rounding_losses(measure, whole, candidates, {})
    assert torch.equal(logits(whole.model), dense)
    assert table.units == tuple(candidates)
    losses = {row.unit: row.loss_C.tolist() for row in table.rows}
    for name, each in losses.items():
        assert len(each) == len(SCHEMES) and all(loss >= 0 for loss in each), name
        assert each[0] >= each[-1]
    assert sum(each[0] for each in losses.values()) > 4 * sum(each[-1] for each in losses.values())


def test_the_sum_of_squared_gradients_is_that_of_each_window_alone() -> None:
    whole = whole_model("llama_gqa")
    name = whole.sites()[0].name
    scheme = named_scheme("int3_g32")
    (loss,) = rounding_losses("fisher", whole, {name: [scheme]}, {})[name].loss_C.tolist()
    with whole.resident() as model:
        weight = model.get_submodule(name).weight.requires_grad_(True)
        squares = torch.zeros_like(weight)
        for ids in whole.context.windows_NT:
            (gradient,) = torch.autograd.grad(whole.loss(ids[None]), weight)
            squares += gradient.square()
        site = whole.sites()[0]
        weight_OI = site.weight_OI
        block_pass("rtn", scheme="int3_g32", range="mse").apply(_Quiet(), [site])  # type: ignore[arg-type]
        slow = float((squares * (site.weight_OI - weight_OI).square()).sum())
    assert loss == pytest.approx(slow, rel=1e-4)


class _Quiet:
    """All that round-to-nearest asks of a block is nothing."""


def test_the_second_derivative_along_signs_is_that_of_finite_differences() -> None:
    whole = whole_model("llama_gqa")
    site = next(site for site in whole.sites() if site.name.endswith("down_proj"))
    whole = whole.within(whole.context.first_windows(1))
    scheme = named_scheme("int3_g32")
    (loss,) = hessian(whole, {site.name: [scheme]})[site.name]
    weight_OI, generator = site.weight_OI, whole.context.generator()
    signs_OI = torch.randint(0, 2, weight_OI.shape, generator=generator).float() * 2 - 1
    with whole.resident() as model:
        weight = model.get_submodule(site.name).weight.requires_grad_(True)

        def slope(step: float) -> float:
            site.write(weight_OI + step * signs_OI)
            (gradient,) = torch.autograd.grad(whole.loss(whole.context.windows_NT), weight)
            return float((gradient * signs_OI).sum(dtype=torch.float64))

        curvature = (slope(1e-3) - slope(-1e-3)) / 2e-3
        site.write(weight_OI)
    block_pass("rtn", scheme="int3_g32", range="mse").apply(_Quiet(), [site])  # type: ignore[arg-type]
    squared = float((site.weight_OI - weight_OI).square().sum())
    assert loss == pytest.approx(max(curvature, 0.0) / weight_OI.numel() * squared, rel=0.02, abs=1e-6)


def test_a_budget_in_bytes_counts_all_weights() -> None:
    model, _ = compressed("llama")
    everything = sum(parameter.numel() for parameter in model.parameters())
    dense_bytes = 4 * everything
    kilobytes = round(dense_bytes * 0.33 / 1000)
    model, rows = compressed("llama", mixed(bits=None, budget=f"{kilobytes}KB"))
    coded = sum(model.get_submodule(row.site).dense_weight().numel() for row in rows)
    spent = 4 * (everything - coded) + sum(
        row.bits_per_weight * model.get_submodule(row.site).dense_weight().numel() / 8 for row in rows
    )
    assert 0.9 * kilobytes * 1000 < spent <= kilobytes * 1000


def test_a_budget_in_bytes_counts_what_earlier_passes_rounded() -> None:
    inside = {"budget": "1.5MB", "quantizer": {"rtn": {}}, "samples": 2}
    recipe = {
        "calibration": {"samples": 2, "tokens": 64},
        "passes": [{"embeddings": {}}, {"mixed_precision": inside}],
        "guard": {"windows": 0},
        "evaluate": {},
        "save": {"format": "llmcompress"},
    }
    made = compress("builtin:books-llama", recipe)
    assert 1_490_000 < ideal_bytes(made.model.to(torch.bfloat16)) <= 1_500_000


def test_a_site_may_have_candidates_of_its_own() -> None:
    model, rows = compressed("llama", mixed(overrides={"*.down_proj": {"schemes": ["int8_channel"]}}))
    assert {row.scheme for row in rows if row.site.endswith("down_proj")} == {"int8_channel"}
    assert average(rows, model) <= 4.5


def test_candidates_of_learned_codes_are_judged_by_the_codes_these_start_from() -> None:
    whole = whole_model("llama_gqa")
    plain = mixed(quantizer={"gptq": {"on_indivisible": "pad"}}).decide(whole)
    learned = mixed(quantizer={"gsq": {"on_indivisible": "pad", "steps": 1}}).decide(whole)
    rounded = mixed(quantizer={"rtn": {"on_indivisible": "pad", "range": "mse"}}).decide(whole)
    assert plain == learned != rounded


@pytest.mark.parametrize("name", ["gptq", "awq", "hqq"])
def test_any_quantizer_can_stand_inside(name: str) -> None:
    inside = {name: {"on_indivisible": "pad"}}
    model, rows = compressed("llama_gqa", mixed(quantizer=inside, sensitivity="output"))
    assert {row.algorithm for row in rows} == {name}
    assert len({row.scheme for row in rows}) > 1
    assert torch.isfinite(logits(model)).all()


def test_sites_that_stay_dense_are_paid_for_in_full() -> None:
    skipping = {"rtn": {"on_indivisible": "skip"}}
    with pytest.raises(CompressError, match=r"32\.000 to 32\.000 bits"):
        compressed("llama_odd", mixed(quantizer=skipping, bits=4.5))


@pytest.mark.parametrize("bits", [1.5, 9.5])
def test_an_average_outside_the_candidates_is_refused_with_what_they_take(bits: float) -> None:
    with pytest.raises(CompressError, match=r"3\.000 to 9\.000 bits per weight"):
        compressed("llama", mixed(bits=bits))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quantizer": {}}, "exactly one"),
        ({"quantizer": {"svd": {}}}, "use one of"),
        ({"quantizer": {"caldera": {}}}, "use one of"),
        ({"quantizer": {"gptq": {"scheme": "int4_g32"}}}, "set `schemes` next to it"),
        ({"quantizer": {"gptq": {"sites": "*"}}}, "set `sites` next to it"),
        ({"quantizer": {"awq": {"round": False}}}, "round"),
        ({"budget": "1GB"}, "not both"),
        ({"bits": None, "budget": "1"}, "pattern"),
        ({"schemes": ()}, "at least one"),
        ({"schemes": ("int9",)}, "not a quantization scheme"),
        ({"overrides": {"*": {"bits": 3}}}, "cannot be overridden"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_with_the_reason(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        mixed(**options)


def test_candidates_that_do_not_divide_are_refused_before_any_work() -> None:
    with pytest.raises(CompressError, match="do not divide"):
        mixed(quantizer={"rtn": {}}, schemes=("int3_g32", "int3_g40")).check(map_of("llama"))


def test_a_decided_recipe_survives_its_own_yaml() -> None:
    decided = mixed()
    settled = decided.with_decisions(decided.decide(whole_model("llama")))
    recipe = parse_recipe("passes:\n  - rtn", "test").model_copy(update={"passes": (settled,)})
    assert parse_recipe(recipe.to_yaml(), "test") == recipe
