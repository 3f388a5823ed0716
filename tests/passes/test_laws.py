"""What every pass must hold on every family with random weights: identities and guarantees, no orderings of quality."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.stream import BlockStream
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.numerics.statistics import Gram
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES, BlockPass
from llmcompress.records.rows import SiteReport
from tests.families import FAMILIES, VOCABULARY, tiny_model

QUANTIZERS: list[tuple[str, dict[str, Any]]] = [
    ("rtn", {"scheme": "int4_g32"}),
    ("gptq", {"scheme": "int3_g32_asym"}),
    ("gptq", {"scheme": "int4_channel", "true_sequential": True, "act_order": False}),
    ("awq", {"scheme": "int3_g32_asym"}),
    ("learned_rounding", {"scheme": "int3_g32_asym", "steps": 4}),
    ("error_propagation", {"scheme": "int3_g32_asym"}),
    ("gsq", {"scheme": "int3_g32_asym", "steps": 4}),
    ("efficient_qat", {"scheme": "int3_g32_asym", "steps": 4}),
    ("rtn", {"scheme": "ternary_g32"}),
]
WEAKEST: list[tuple[str, dict[str, Any]]] = [
    ("smoothquant", {"strength": 0.0}),
    ("smoothquant", {"strength": 0.5, "folds": "all"}),
    ("awq", {"scheme": "int3_g32_asym", "round": False}),
]
"""Settings at which a pass only rearranges: the logits may not move."""

_maps: dict[str, ModelMap] = {}


def map_of(family: str, model: Any) -> ModelMap:
    """Mapping is the slowest part; every test of a family shares it."""
    if family not in _maps:
        _maps[family] = map_model(model)
    return _maps[family]


def windows(seed: int = 0, count: int = 6, tokens: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, tokens), generator=generator)


def make(name: str, options: dict[str, Any]) -> BlockPass:
    padded = {"on_indivisible": "pad"} if "on_indivisible" in PASSES[name].model_fields else {}
    return PASSES[name](**padded, **options)


def compressed(family: str, *passes: BlockPass, dtype: torch.dtype = torch.float32) -> tuple[Any, list[SiteReport]]:
    model = tiny_model(family, seed=1)
    model, rows = apply_passes(
        model,
        map_of(family, model),
        passes,
        RunContext(windows(), batch=4, storage_dtype=dtype),
    )
    return model, rows


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(windows(seed=9, count=2)).logits.double()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "options"), WEAKEST, ids=str)
def test_at_its_weakest_a_pass_leaves_the_logits(family: str, name: str, options: dict[str, Any]) -> None:
    dense = logits(tiny_model(family, seed=1))
    model, _ = compressed(family, make(name, options))
    torch.testing.assert_close(logits(model), dense, atol=2e-4 * float(dense.abs().max()), rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "options"), QUANTIZERS, ids=str)
def test_quantizers_never_lose_to_plain_rounding_and_are_deterministic(
    family: str, name: str, options: dict[str, Any]
) -> None:
    model, rows = compressed(family, make(name, options))
    again, rows_again = compressed(family, make(name, options))
    assert rows == rows_again
    for (key, tensor), (_, tensor_again) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(tensor, tensor_again), key
    assert {row.site for row in rows} == set(map_of(family, model).site_names())
    for row in rows:
        assert isinstance(model.get_submodule(row.site), QuantLinear)
        if row.error is not None and row.error_before is not None:
            # AWQ's guarantee is per fold, before clipping and for weights in float32
            assert row.error <= row.error_before * (1.0 if name == "gptq" else 1.02), row
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "opt"])
def test_eight_bits_hardly_move_the_logits(family: str) -> None:
    dense = logits(tiny_model(family, seed=1))
    for name in ("rtn", "gptq", "awq"):
        model, _ = compressed(family, make(name, {"scheme": "int8_g32_asym"}))
        assert (logits(model) - dense).abs().max() < 0.05 * dense.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothquant_then_gptq_in_eight_bits_hardly_moves_the_logits(family: str) -> None:
    dense = logits(tiny_model(family, seed=1))
    model, rows = compressed(
        family, make("smoothquant", {"folds": "all"}), make("gptq", {"scheme": "int8_channel_a8token"})
    )
    assert {row.algorithm for row in rows} >= {"gptq"}
    # the median: where experts are routed, a token that goes elsewhere moves its logits by any amount
    assert (logits(model) - dense).abs().median() < 0.02 * dense.abs().max()


def test_awq_scales_then_gptq_rounding_equals_gptq_on_the_scaled_weights() -> None:
    """The second pass sees what the first one left: folded weights, and statistics measured again."""
    first = {"sites": ("*.layers.0.*",), "scheme": "int3_g32"}
    scales, rounding = make("awq", {**first, "round": False}), make("gptq", first)
    together, rows = compressed("llama_gqa", scales, rounding)
    assert [row.algorithm for row in rows].count("gptq") == 7
    apart, _ = compressed("llama_gqa", scales)
    apply_passes(
        apart,
        map_of("llama_gqa", apart),
        (rounding,),
        RunContext(windows(), batch=4),
    )
    assert torch.equal(logits(together), logits(apart))
    alone, _ = compressed("llama_gqa", rounding)
    assert not torch.equal(logits(together), logits(alone))


SELECTING = [name for name in PASSES if issubclass(PASSES[name], BlockPass)]
NEEDED: dict[str, dict[str, Any]] = {
    "outlier_suppression": {"scheme": "int8_channel_a8token"},
    "low_rank_correction": {"quantizer": {"rtn": {"scheme": "int4_g32"}}},
    "mixed_precision": {"schemes": ("int3_g32", "int4_g32"), "bits": 4.5},
    "tucker": {"sites": ("*.self_attn.*",), "exclude": ("*.0.*",)},
    "bnb_nf4": {"exclude": ("*.0.*", "*.down_proj")},
}
"""Options without which a pass refuses a tiny model."""


@pytest.mark.parametrize("name", SELECTING)
def test_sites_not_selected_are_bit_identical(name: str) -> None:
    before = tiny_model("llama_gqa", seed=1).state_dict()
    only_mlp = {"sites": ("*.mlp.*",), "exclude": ("*.0.*",)}
    scheme = {"scheme": "int4_g32"} if "scheme" in PASSES[name].model_fields else {}
    model, rows = compressed("llama_gqa", PASSES[name](**{**only_mlp, **scheme, **NEEDED.get(name, {})}))
    assert rows
    part = ".self_attn." if name == "tucker" else ".mlp."
    for key, tensor in model.state_dict().items():
        in_mlp = part in key and ".layers.0." not in key
        # folding into the MLP's inputs also changes what gives them out
        feeds_mlp = "post_attention_layernorm" in key and ".layers.0." not in key
        if not in_mlp and not feeds_mlp:
            assert torch.equal(tensor, before[key]), key


def test_overrides_give_mixed_precision_and_the_last_match_wins() -> None:
    mixed = PASSES["rtn"](
        scheme="int4_g32", overrides={"*": {"scheme": "int3_g32"}, "*.down_proj": {"scheme": "int8_channel"}}
    )
    model, rows = compressed("llama", mixed)
    schemes = {row.site.rsplit(".", 1)[1]: row.scheme for row in rows}
    assert schemes["down_proj"] == "int8_channel" and schemes["q_proj"] == "int3_g32"
    assert model.model.layers[0].mlp.down_proj.scheme.weights.bits == 8


@pytest.mark.every_family
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_statistics_equal_those_of_the_whole_model(family: str) -> None:
    """Also while earlier blocks are already compressed: the stream feeds on what they became."""
    model = tiny_model(family, seed=1)
    model_map = map_of(family, model)
    rtn = make("rtn", {"scheme": "int3_g32"})
    stream = BlockStream(
        model,
        model_map,
        RunContext(windows(), batch=4),
    )
    for work in stream:
        work.measure(work.sites, (Gram,))
        streamed = {site.name: site.statistic(Gram).sum_II.clone() for site in work.sites}
        for name, whole in whole_model_grams(model, [site.name for site in work.sites]):
            scale = float(whole.abs().max()) + 1e-9
            torch.testing.assert_close(streamed[name], whole, atol=1e-3 * scale, rtol=1e-3, msg=name)
        rtn.run(work)


def whole_model_grams(model: nn.Module, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    with torch.no_grad():
        for ids in windows().split(4):
            model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    for name in names:
        if inputs[name]:
            x = torch.cat(inputs[name])
            yield name, x.T @ x


def test_bfloat16_scales_and_weights_survive_storage_unchanged() -> None:
    for name, options in [*QUANTIZERS, *WEAKEST]:
        model, _ = compressed("llama_gqa", make(name, options), dtype=torch.bfloat16)
        for key, tensor in model.model.layers.state_dict().items():
            if tensor.is_floating_point():
                assert torch.equal(tensor, tensor.bfloat16().float()), (name, key)


@torch.no_grad()
def test_awq_compares_errors_with_outputs_of_the_same_scale() -> None:
    """Outputs of v and up are divided where they feed a fold: error and output must both be those after it."""
    scaled, _ = compressed("llama_gqa", make("awq", {"scheme": "int3_g32", "round": False}))
    rounded, rows = compressed("llama_gqa", make("awq", {"scheme": "int3_g32"}))
    reported = {row.site: row.error for row in rows}
    first = next(site for site in map_of("llama_gqa", scaled).site_names() if site.endswith("v_proj"))
    for name in (first, first.replace("self_attn.v_proj", "mlp.up_proj")):
        site, inputs = scaled.get_submodule(name), []
        handle = site.register_forward_pre_hook(lambda _, args, seen=inputs: seen.append(args[0]))
        scaled(windows())
        handle.remove()
        wanted = inputs[0] @ site.weight.T
        found = inputs[0] @ rounded.get_submodule(name).dense_weight().T
        error = float((found - wanted).square().sum() / wanted.square().sum())
        assert reported[name] == pytest.approx(error, rel=1e-3), name
