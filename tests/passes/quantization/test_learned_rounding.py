"""Rounding learned block by block: what it may change, what it must not, what it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.stream import BlockStream
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.numerics.grid import Fitted, round_to_codes
from llmcompress.numerics.ranges import fit
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES
from llmcompress.passes.quantization.learned_rounding import LearnedRounding
from llmcompress.progress import Silent
from llmcompress.run import Run
from tests.families import tiny_model
from tests.passes.test_laws import compressed, logits, make, map_of, windows

SCHEMES = ["int2_g32", "int3_g32_asym", "int4_channel", "int8_channel_a8token", "int8_channel_a8tensor"]


def distance(model: Any, dense: Tensor) -> float:
    with torch.no_grad():
        return float((model(windows()).logits.double() - dense).square().mean())


@torch.no_grad()
def dense_logits(family: str) -> Tensor:
    return tiny_model(family, seed=1)(windows()).logits.double()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_never_end_worse_than_they_began(scheme: str) -> None:
    model, rows = compressed("llama_gqa", make("learned_rounding", {"scheme": scheme, "steps": 20}))
    assert all(row.error <= row.error_before for row in rows if row.error is not None and row.error_before is not None)
    assert {row.site for row in rows} == set(map_of("llama_gqa", model).site_names())
    assert torch.isfinite(logits(model)).all()


def test_the_whole_model_errs_less_on_what_was_learned_from() -> None:
    dense = dense_logits("llama")
    plain, _ = compressed("llama", make("rtn", {"scheme": "int3_g32", "range": "mse"}))
    learned, rows = compressed("llama", make("learned_rounding", {"scheme": "int3_g32", "steps": 60}))
    assert distance(learned, dense) < 0.8 * distance(plain, dense)
    # six windows of random tokens: on the one that is held out not every block improves
    assert not all(row.degraded for row in rows)


def test_every_code_is_next_to_the_weight() -> None:
    model, _ = compressed("llama_gqa", make("learned_rounding", {"scheme": "int4_g32", "steps": 30}))
    dense = tiny_model("llama_gqa", seed=1)
    moved = 0
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            fitted = Fitted.of_stored(module.scheme.weights, module.scale_OG.float(), module.zero_OG, None)
            nearest_OI = round_to_codes(dense.get_parameter(f"{name}.weight").float(), fitted)
            apart_OI = (module.codes_OI.int() - nearest_OI.int()).abs()
            assert int(apart_OI.max()) <= 1, name
            moved += int(apart_OI.sum())
    assert moved > 0


@pytest.mark.parametrize("scheme", ["int4_g32", "int2_g32_asym"])
def test_zeros_of_an_earlier_pass_stay(scheme: str) -> None:
    """Long steps: offsets come to half a code, which moves an exact zero where its zero point is odd."""
    pruning, learning = PASSES["magnitude"](sparsity=0.5), {"scheme": scheme, "steps": 10, "rate": 0.5}
    model, rows = compressed("llama_gqa", pruning, make("learned_rounding", learning))
    assert any(row.scheme and not row.degraded for row in rows)
    pruned, _ = compressed("llama_gqa", pruning)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            assert (module.dense_weight()[pruned.get_parameter(f"{name}.weight") == 0] == 0).all(), name


def test_what_it_cannot_round_is_refused() -> None:
    with pytest.raises(ValueError, match="integer grids"):
        LearnedRounding(scheme="nf4_g64")


def test_a_wild_rate_falls_back_to_plain_rounding() -> None:
    options = {"scheme": "int8_g32", "steps": 1, "rate": 1.0}
    model, rows = compressed("llama_gqa", make("learned_rounding", options))
    assert any("rounded to nearest" in (row.degraded or "") for row in rows)
    assert all(row.error == row.error_before for row in rows if row.degraded)
    site = next(name for name, module in model.named_modules() if isinstance(module, QuantLinear))
    weight_OI = tiny_model("llama_gqa", seed=1).get_parameter(f"{site}.weight")
    found = model.get_submodule(site)
    assert found.codes_OI.shape == weight_OI.shape
    assert fit(weight_OI, found.scheme.weights).scale_OG.shape == found.scale_OG.shape


@torch.no_grad()
def test_dense_outputs_are_those_of_blocks_that_nobody_touched() -> None:
    model = tiny_model("llama_gqa", seed=1)
    options = {"batch": 4, "device": torch.device("cpu"), "storage_dtype": torch.float32, "progress": Silent()}
    untouched = [
        block.outputs() for block in BlockStream(model, map_of("llama_gqa", model), RunContext(windows(), **options))
    ]
    stream = BlockStream(model, map_of("llama_gqa", model), RunContext(windows(), **options), dense=True)
    for block, wanted in zip(stream, untouched, strict=True):
        for found, expected in zip(block.dense_outputs, wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        for site in block.sites:
            site.write(torch.zeros_like(site.weight_OI))


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class Dying(Silent):
        def step(self, text: str) -> None:
            if "block 1/" in text:
                raise Killed

    def run(progress: Silent) -> Any:
        model = tiny_model("llama_gqa", seed=1)
        with Run.open(tmp_path / "out", fingerprint={}, lock_text="", fresh=False) as keep:
            return apply_passes(
                model,
                map_of("llama_gqa", model),
                [make("learned_rounding", {"scheme": "int3_g32", "steps": 5})],
                RunContext(windows(), batch=4, progress=progress, keep=keep),
            )

    with pytest.raises(Killed):
        run(Dying())
    resumed = run(Silent()).model
    whole, _ = compressed("llama_gqa", make("learned_rounding", {"scheme": "int3_g32", "steps": 5}))
    assert torch.equal(logits(resumed), logits(whole))
