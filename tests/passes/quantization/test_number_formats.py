"""Passes know nothing of number formats: each works with all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmcompress.errors import CompressError
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.scheme import named_scheme
from llmcompress.passes.base import PASSES
from tests.families import tiny_model
from tests.passes.test_laws import compressed, logits, make, map_of

SCHEMES = [
    "int5_g32",
    "int7_channel_asym",
    "fp8_tensor",
    "fp8e5m2_g32",
    "fp4_g16",
    "nf4_g64",
    "mxfp4",
    "mxfp8_a",
    "nvfp4_a",
]


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("options", [{"act_order": True}, {"act_order": False}], ids=str)
def test_gptq_never_loses_to_plain_rounding(family: str, scheme: str, options: dict[str, Any]) -> None:
    model, rows = compressed(family, make("gptq", {"scheme": scheme, **options}), dtype=torch.bfloat16)
    assert {row.scheme for row in rows} == {scheme}
    gained = 0
    for row in rows:
        module = model.get_submodule(row.site)
        assert isinstance(module, QuantLinear) and row.error <= row.error_before
        gained += row.error < row.error_before
        storage = module.scale_OG.to(torch.bfloat16).to(module.scale_OG.dtype)
        assert torch.equal(storage, module.scale_OG)
    assert gained > len(rows) / 2
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_awq_works_with_every_format(scheme: str) -> None:
    dense = logits(tiny_model("llama_gqa", seed=1))
    model, rows = compressed("llama_gqa", make("awq", {"scheme": scheme, "points": 3}))
    # AWQ's guarantee is per fold, before clipping
    assert sum(row.error for row in rows) <= 1.02 * sum(row.error_before for row in rows)
    assert (logits(model) - dense).abs().median() < 0.2 * dense.abs().max()


@pytest.mark.parametrize("scheme", ["nf4_g32", "mxfp4", "nvfp4", "fp8_tensor"])
def test_zeros_stay_zeros(scheme: str) -> None:
    model, _ = compressed("llama", make("sparsegpt", {"sparsity": 0.5, "scheme": scheme}))
    for module in model.modules():
        if isinstance(module, QuantLinear):
            assert (module.dense_weight() == 0).float().mean() >= 0.49


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("caldera", {"scheme": "nf4_g32", "rank": 2, "iterations": 1, "factor_scheme": "mxfp8"}),
        ("low_rank_correction", {"quantizer": {"rtn": {"scheme": "nvfp4"}}, "rank": 2}),
    ],
    ids=str,
)
def test_branches_repair_every_format(name: str, options: dict[str, Any]) -> None:
    extra = {"on_indivisible": "pad"} if name == "caldera" else {}
    _, rows = compressed("llama_gqa", PASSES[name](**extra, **options))
    assert all(row.error <= row.error_before * (1 + 1e-6) for row in rows)


@pytest.mark.parametrize("scheme", ["nf4_g40", "mxfp4", "nvfp4_a", "fp8_g48"])
def test_a_ragged_last_group_is_refused_or_right(scheme: str) -> None:
    model_map = map_of("llama_odd", tiny_model("llama_odd", seed=1))
    widths = {site.inputs for block in model_map.blocks for site in block.structure.sites}
    group = named_scheme(scheme).weights.group
    assert group and any(width % group for width in widths)
    with pytest.raises(CompressError, match="do not divide"):
        PASSES["rtn"](scheme=scheme).check(model_map)
    model, rows = compressed("llama_odd", PASSES["rtn"](scheme=scheme, on_indivisible="pad"))
    dense = tiny_model("llama_odd", seed=1)
    for row in rows:
        weight, module = dense.get_submodule(row.site).weight, model.get_submodule(row.site)
        assert (module.dense_weight() - weight).norm() < 0.2 * weight.norm()
    assert torch.isfinite(logits(model)).all()
    if scheme.endswith("_a"):
        with pytest.raises(CompressError, match="do not divide"):
            PASSES["rtn"](scheme=scheme, on_indivisible="channel").check(model_map)
    else:
        _, rows = compressed("llama_odd", PASSES["rtn"](scheme=scheme, on_indivisible="channel"))
        assert any(row.scheme.endswith("_channel") for row in rows)


def test_input_scales_of_nvfp4_come_from_the_calibration_text() -> None:
    model, _ = compressed("llama", make("rtn", {"scheme": "nvfp4_a"}))
    first = model.model.layers[0].self_attn.q_proj
    assert first.input_scale.dtype == torch.int32 and first.input_scale.view(torch.float32) > 1
