"""Every block makes up for what the blocks before it lost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.model.probe import map_model
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.error_compensation import Drift, compensated
from llmcompress.numerics.grid import restore, round_to_codes
from llmcompress.numerics.ranges import fit
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES
from llmcompress.passes.quantization.error_propagation import ErrorPropagation
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe
from tests.families import tiny_model
from tests.passes.test_laws import compressed, logits, make, map_of, windows

QUANTIZERS: list[dict[str, dict[str, Any]]] = [
    {"rtn": {}},
    {"gptq": {}},
    {"awq": {}},
    {"gptq": {"true_sequential": True}},
    {"learned_rounding": {"steps": 4}},
    {"scale_refinement": {"quantizer": {"gptq": {}}}},
]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_every_quantizer_can_stand_inside(quantizer: dict[str, dict[str, Any]]) -> None:
    model, rows = compressed("llama_gqa", make("error_propagation", {"scheme": "int3_g32", "quantizer": quantizer}))
    assert {row.site for row in rows} == set(map_of("llama_gqa", model).site_names())
    assert all((row.algorithm or "").startswith("error_propagation, ") for row in rows)
    assert torch.isfinite(logits(model)).all()


@torch.no_grad()
def test_the_trained_model_errs_less_on_other_text() -> None:
    """Trained weights: of random ones nothing can be expected."""
    loaded = load_for_compression(find_source("builtin:books-llama"), dtype=torch.float32)
    settings = Calibration(source="builtin:calibration", samples=24, tokens=128)
    data = calibration_windows(settings, loaded.tokenizer, max_positions=512, seed=0, progress=Silent()).windows_NT
    model_map = map_model(loaded.model)
    calibrating, held_out = data[:20], data[20:]
    dense = loaded.model(held_out).logits

    def distance(recipe: str) -> float:
        found = apply_passes(
            copy.deepcopy(loaded.model),
            model_map,
            parse_recipe(f"passes: [{recipe}]", "test").passes,
            RunContext(calibrating, batch=4),
        ).model
        return float((found(held_out).logits - dense).square().mean())

    plain, carried = (distance(f"{{{name}: {{scheme: int2_g32}}}}") for name in ("gptq", "error_propagation"))
    assert carried < 0.95 * plain


def test_the_first_linears_have_nothing_to_compensate_and_the_ones_behind_them_have() -> None:
    alone, _ = compressed("llama_gqa", make("gptq", {"scheme": "int4_g32"}))
    after, _ = compressed("llama_gqa", make("error_propagation", {"scheme": "int4_g32"}))
    same = [
        torch.equal(part.codes_OI, after.get_submodule(name).codes_OI)
        for name, part in alone.named_modules()
        if isinstance(part, QuantLinear)
    ]
    first = len(map_of("llama_gqa", alone).blocks[0].structure.groups[0].sites)
    assert all(same[:first]) and not any(same[first:])


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_weights_move_at_most_as_far_as_the_strength_says(strength: float) -> None:
    """The second block behind a first one that was rounded: its inputs are seen from outside in both models."""
    first = make("rtn", {"scheme": "int2_g32", "sites": ("*.layers.0.*",)})
    name = "model.layers.1.self_attn.q_proj"
    options = {"scheme": "int8_channel", "sites": (name,), "quantizer": {"rtn": {}}, "strength": strength}
    model, _ = compressed("llama_gqa", first, make("error_propagation", options))
    dense = tiny_model("llama_gqa", seed=1)
    seen: list[torch.Tensor] = []
    for each in (dense, model):
        each.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    drift = Drift(dense.config.hidden_size, torch.device("cpu"))
    for batch in windows().split(4):
        seen.clear()
        dense(batch)
        model(batch)
        drift.add(*seen)
    (moved,) = compensated([dense.get_submodule(name).weight], drift, strength=strength, damping=0.1)
    fitted = fit(moved, named_scheme("int8_channel").weights)
    wanted, found = restore(round_to_codes(moved, fitted), fitted), model.get_submodule(name).dense_weight()
    assert torch.isclose(found, wanted, atol=1e-5).float().mean() > 0.99
    assert not torch.isclose(found, dense.get_submodule(name).weight, atol=1e-2).all()


def test_only_selected_sites_move_and_zeros_stay() -> None:
    passes = (
        PASSES["magnitude"](sparsity=0.5),
        make("error_propagation", {"scheme": "int4_g32", "exclude": ("*.down_proj",), "quantizer": {"rtn": {}}}),
    )
    model, _ = compressed("llama_gqa", *passes)
    pruned, _ = compressed("llama_gqa", passes[0])
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            assert (module.dense_weight()[pruned.get_parameter(f"{name}.weight") == 0] == 0).all()
        elif name.endswith("down_proj"):
            assert torch.equal(module.weight, pruned.get_parameter(f"{name}.weight"))


def test_experts_stay_and_the_rest_moves() -> None:
    model, rows = compressed("qwen3_moe", make("error_propagation", {"scheme": "int4_g32"}))
    moved = {row.site for row in rows if (row.algorithm or "").startswith("error_propagation")}
    assert moved and not any(".experts." in site for site in moved)
    assert torch.isfinite(logits(model)).all()


def test_schemes_may_differ_from_site_to_site() -> None:
    options = {"scheme": "int4_g32", "overrides": {"*.down_proj": {"scheme": "int8_channel"}}}
    model, rows = compressed("llama_gqa", make("error_propagation", options))
    assert {row.scheme for row in rows if row.site.endswith("down_proj")} == {"int8_channel"}
    assert tiny_model("llama_gqa", seed=1).config.hidden_size == model.config.hidden_size


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"quantizer": {"smoothquant": {}}}, "does not only quantize"),
        ({"quantizer": {"gptq": {"scheme": "int4_g32"}}}, "cannot be set inside"),
        ({"quantizer": {"gptq": {"on_indivisible": "pad"}}}, "next to it"),
        ({"overrides": {"*.q_proj": {"strength": 0.5}}}, "cannot be overridden"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ErrorPropagation(**options)
