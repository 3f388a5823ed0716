"""Outlier suppression is exact, never worse than nothing on its own objective, and shifts where biases take it up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.stream import BlockStream
from llmcompress.numerics.clusters import Range
from llmcompress.passes.quantization.outlier_suppression import OutlierSuppression
from tests.families import FAMILIES, tiny_model
from tests.passes.quantization.rearranged import compressed, logits, map_of, windows

SHIFTED = {
    "phi": ("input_layernorm", "self_attn.v_proj"),
    "opt": ("self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm"),
    "gpt2": ("ln_1", "attn.c_attn", "ln_2"),
    "gpt_neox": ("input_layernorm", "attention.query_key_value", "post_attention_layernorm"),
    "bloom": ("input_layernorm", "self_attention.query_key_value", "post_attention_layernorm"),
    "stablelm": ("input_layernorm",),
    "llama": (),
    "qwen2": (),
    "olmo2": (),
}
"""What gives way where: norms and value projections with biases, if every reader has one too."""


def suppressed(family: str, **options: Any) -> tuple[Any, Any]:
    return compressed(family, (OutlierSuppression(**{"points": 5, "batches": 1, **options}),))


@pytest.mark.parametrize("scheme", ["int8_channel_a8tensor", "int4_g32_a8token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_stay_and_the_search_never_loses_to_doing_nothing(family: str, scheme: str) -> None:
    model, rows = suppressed(family, scheme=scheme)
    expected = logits(tiny_model(family, seed=1))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert rows and all(0 < row.error <= row.error_before for row in rows)
    if scheme.endswith("tensor"):  # random weights or not: one range for all channels wastes most of it
        assert sum(row.error for row in rows) < 0.9 * sum(row.error_before for row in rows)


@pytest.mark.parametrize("family", SHIFTED)
def test_after_the_shift_channels_are_symmetric_on_calibration_text(family: str) -> None:
    model, _ = suppressed(family)
    stream = BlockStream(
        model,
        map_of(family),
        RunContext(windows(), batch=4),
    )
    work = next(iter(stream))
    work.measure(work.sites, (Range,))
    symmetric = []
    for fold in work.folds_into(work.sites):
        measured = work.site(fold.consumers[0]).statistic(Range)
        one_to_one = len(set(fold.channel_map)) == len(fold.channel_map)
        reach = torch.maximum(measured.high_I, -measured.low_I)
        if one_to_one and float((measured.high_I + measured.low_I).abs().max()) < 1e-3 * float(reach.max()):
            symmetric.append(fold.producer)
    assert tuple(symmetric) == SHIFTED[family]


def test_without_the_shift_nothing_but_scales_changes() -> None:
    before = tiny_model("opt", seed=1).state_dict()
    model, _ = suppressed("opt", shift=False)
    after = model.state_dict()
    fraction = (
        after["model.decoder.layers.0.self_attn_layer_norm.bias"]
        / before["model.decoder.layers.0.self_attn_layer_norm.bias"]
    )
    gain = (
        after["model.decoder.layers.0.self_attn_layer_norm.weight"]
        / before["model.decoder.layers.0.self_attn_layer_norm.weight"]
    )
    torch.testing.assert_close(fraction, gain)
    assert (gain < 1.0001).all() and (gain < 0.999).any()
    assert torch.equal(
        after["model.decoder.layers.0.self_attn.q_proj.bias"], before["model.decoder.layers.0.self_attn.q_proj.bias"]
    )


def test_an_outlier_channel_is_shrunk_to_the_threshold_that_the_row_tells() -> None:
    model = tiny_model("llama", seed=1)
    norm = model.model.layers[0].input_layernorm
    norm.weight.data[3] *= 40
    for name in "qkv":
        model.get_submodule(f"model.layers.0.self_attn.{name}_proj").weight.data[:, 3] /= 40
    expected = logits(model)
    largest = float(norm.weight.detach()[3])
    changed, rows = compressed("llama", (OutlierSuppression(scheme="int8_channel_a8tensor"),), model=model)
    row = next(row for row in rows if row.site.endswith("layers.0.self_attn.q_proj"))
    assert row.error < 0.1 * row.error_before
    assert float(changed.model.layers[0].input_layernorm.weight.detach()[3]) < 0.2 * largest
    torch.testing.assert_close(logits(changed), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_it_is_deterministic_and_survives_storage_in_bfloat16() -> None:
    passes = (OutlierSuppression(points=4, batches=1),)
    one, again = (compressed("opt", passes, dtype=torch.bfloat16)[0].state_dict() for _ in range(2))
    assert all(torch.equal(tensor, again[key]) for key, tensor in one.items())
    for key, tensor in one.items():
        if "layers" in key:
            assert torch.equal(tensor, tensor.bfloat16().float()), key


def test_options_that_round_no_activations_are_refused() -> None:
    with pytest.raises(ValidationError, match="does not quantize activations"):
        OutlierSuppression(scheme="int4_g128")
    assert OutlierSuppression().conflict_with("ranges") and OutlierSuppression().conflict_with("codes")
    assert OutlierSuppression().conflict_with("zeros") is None
