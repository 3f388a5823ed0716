"""Blocks that multiply in bfloat16 while calibration data run through them; what is computed from that is float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmcompress import compress
from llmcompress.calibration.context import RunContext
from llmcompress.calibration.settings import Calibration
from llmcompress.calibration.stream import BlockStream, BlockWork
from llmcompress.model.probe import map_model
from llmcompress.numerics.statistics import Gram
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import Pass
from llmcompress.passes.pruning.width import Width
from llmcompress.passes.quantization.gptq import GPTQ
from tests.families import FAMILIES, tiny_model, tiny_tokens

NEAR = 0.02
"""Products of bfloat16 are off by 2⁻⁹ each; two blocks of a tiny model add up to less than this, relative."""


def context(family: str) -> RunContext:
    return RunContext(tiny_tokens(family, batch=6, length=24, seed=3), batch=3)


def blocks(family: str, given: RunContext) -> Iterator[BlockWork]:
    model = tiny_model(family, seed=1)
    yield from BlockStream(model, map_model(model), given)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


ROUTED = {"mixtral", "qwen3_moe"}
"""Tokens near a border go to another expert."""


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - ROUTED))
def test_outputs_and_statistics_are_near_those_of_float32_and_float32_themselves(family: str) -> None:
    plain = context(family)
    mixed = blocks(family, replace(plain, mixed_precision="bf16"))
    for there, here in zip(mixed, blocks(family, plain), strict=True):
        for found, expected in zip(there.outputs(), here.outputs(), strict=True):
            assert found.dtype == torch.float32
            assert 0 < distance(found, expected) < NEAR
        for work in (there, here):
            work.measure(work.sites, (Gram,))
        for ours, plain_site in zip(there.sites, here.sites, strict=True):
            found, expected = ours.statistic(Gram).sum_II, plain_site.statistic(Gram).sum_II
            assert found.dtype == torch.float32 and distance(found, expected) < NEAR
        assert {parameter.dtype for parameter in there.module.parameters()} == {torch.float32}


def test_the_stored_weights_are_nearly_those_of_float32() -> None:
    found = {}
    for precision in (None, "bf16"):
        model = tiny_model("llama_gqa", seed=1)
        given = replace(context("llama_gqa"), mixed_precision=precision)
        passes: list[Pass] = [Width(fraction=0.25, round_to=16), GPTQ(scheme="int8_g16")]
        result = apply_passes(model, map_model(model), passes, given).model
        with torch.no_grad():
            found[precision] = result(tiny_tokens("llama_gqa")).logits
    assert 0 < distance(found["bf16"], found[None]) < 0.1


def test_a_recipe_asks_for_it() -> None:
    recipe = {
        "calibration": {"samples": 16, "tokens": 64, "mixed_precision": "bf16"},
        "guard": {"windows": 0},  # a block that is worse than plain rounding would be replaced by that in both
        "passes": [{"gptq": {"scheme": "int4_g32"}}],
        "evaluate": {"perplexity": [{"source": "builtin:evaluation", "window": 64, "max_windows": 8}]},
    }
    ratios = {}
    for precision in (None, "bf16"):
        calibration = {**recipe["calibration"], "mixed_precision": precision}
        report = compress("builtin:books-llama", {**recipe, "calibration": calibration}).report
        ratios[precision] = report.quality[0].ratio
    assert ratios["bf16"] == pytest.approx(ratios[None], rel=0.02) and ratios["bf16"] != ratios[None]


@pytest.mark.parametrize(("capabilities", "chosen"), [({"avx512_bf16": True}, "bf16"), ({"avx2": True}, None)])
def test_auto_is_bfloat16_where_the_processor_has_instructions_for_it(
    capabilities: dict[str, bool], chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    settings = Calibration(mixed_precision="auto")
    assert settings.of_blocks(torch.device("cpu"))["mixed_precision"] == chosen
    assert Calibration().of_blocks(torch.device("cpu"))["mixed_precision"] is None


def test_auto_is_float32_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert Calibration(mixed_precision="auto").of_blocks(torch.device("cpu"))["mixed_precision"] is None
    assert Calibration(mixed_precision="bf16").of_blocks(torch.device("cpu"))["mixed_precision"] == "bf16"


def test_a_result_records_what_auto_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    calibration = {"samples": 2, "tokens": 32, "mixed_precision": "auto"}
    recipe = {"calibration": calibration, "passes": [{"gptq": {"scheme": "int4_g32"}}], "evaluate": {}}
    made = compress("builtin:books-llama", recipe)
    assert made.recipe.calibration.mixed_precision == "bf16"
