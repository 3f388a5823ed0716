"""Codes learned from another quantizer's: what may change, what must not, what it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.stream import BlockStream
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES
from llmcompress.passes.quantization.gsq import GSQ
from llmcompress.progress import Silent
from llmcompress.run import Run
from tests.families import tiny_model
from tests.passes.quantization.test_learned_rounding import dense_logits, distance
from tests.passes.test_laws import compressed, logits, make, map_of, windows

RELAXATIONS = ["straight_through", "gumbel"]


def taught(family: str, name: str, options: dict[str, Any]) -> Any:
    """The model after a pass that saw enough windows for what is learned to hold on others."""
    model = tiny_model(family, seed=1)
    context = RunContext(windows(count=40), batch=8)
    return apply_passes(model, map_of(family, model), (make(name, options),), context).model


def quantized(model: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize(
    "scheme", ["int2_g32", "int3_g32_asym", "ternary_g32", "int4_channel", "int8_channel_a8tensor"]
)
def test_blocks_never_end_worse_than_they_began(scheme: str) -> None:
    model, rows = compressed("llama_gqa", make("gsq", {"scheme": scheme, "steps": 16}))
    assert all(row.error <= row.error_before for row in rows if row.error is not None and row.error_before is not None)
    assert {row.site for row in rows} == set(map_of("llama_gqa", model).site_names())
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_the_whole_model_errs_less_than_the_quantizer_alone(relaxation: str) -> None:
    dense = dense_logits("llama")
    plain = taught("llama", "gptq", {"scheme": "int2_g32"})
    learned = taught("llama", "gsq", {"scheme": "int2_g32", "steps": 120, "rate": 0.01, "relaxation": relaxation})
    assert distance(learned, dense) < 0.98 * distance(plain, dense)


def test_every_code_is_next_to_the_first_and_some_have_moved() -> None:
    first_block = {"scheme": "int3_g32", "sites": "*.layers.0.*"}
    start = taught("llama_gqa", "gptq", first_block)
    found = taught("llama_gqa", "gsq", {**first_block, "steps": 120, "rate": 0.01})
    first = quantized(start)
    moved = [(module.codes_OI.int() - first[name].codes_OI.int()).abs() for name, module in quantized(found).items()]
    assert len(moved) == 7 and all(int(each.max()) <= 1 for each in moved)
    assert sum(int(each.sum()) for each in moved) > 0


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("scheme", ["int4_g32", "int2_g32_asym"])
def test_zeros_of_an_earlier_pass_stay(scheme: str, relaxation: str) -> None:
    pruning = PASSES["magnitude"](sparsity=0.5)
    options = {"scheme": scheme, "steps": 10, "rate": 0.5, "relaxation": relaxation}
    model, _ = compressed("llama_gqa", pruning, make("gsq", options))
    pruned, _ = compressed("llama_gqa", pruning)
    for name, module in quantized(model).items():
        assert (module.dense_weight()[pruned.get_parameter(f"{name}.weight") == 0] == 0).all(), name


def test_after_wild_steps_the_quantizers_codes_stay() -> None:
    options = {"scheme": "int8_g32", "steps": 2, "rate": 1.0}
    model, rows = compressed("llama_gqa", make("gsq", options))
    plain, _ = compressed("llama_gqa", make("gptq", {"scheme": "int8_g32"}))
    assert all(row.error == row.error_before for row in rows)
    assert torch.equal(logits(model), logits(plain))


def test_norms_that_feed_other_linears_too_stay() -> None:
    before = tiny_model("llama_gqa", seed=1).state_dict()
    some = {"scheme": "int2_g32", "steps": 40, "rate": 0.02, "sites": ["*.layers.0.*.q_proj", "*.layers.0.mlp.*"]}
    model, _ = compressed("llama_gqa", make("gsq", some))
    after = model.state_dict()
    assert torch.equal(after["model.layers.0.input_layernorm.weight"], before["model.layers.0.input_layernorm.weight"])
    still, _ = compressed("llama_gqa", make("gsq", {**some, "tune_norms": False}))
    for name, tensor in still.state_dict().items():
        if "norm" in name:
            assert torch.equal(tensor, before[name]), name


def test_what_it_cannot_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="integer grids"):
        GSQ(scheme="nf4_g64")
    with pytest.raises(ValueError, match="next to it"):
        GSQ(quantizer={"gptq": {"on_indivisible": "pad"}})


def test_another_quantizer_may_find_the_first_codes() -> None:
    _, rows = compressed("llama_gqa", make("gsq", {"scheme": "int3_g32", "steps": 4, "quantizer": {"rtn": {}}}))
    assert {row.algorithm for row in rows} == {"gsq, rtn"}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama_gqa", "bloom", "falcon"])
def test_some_windows_of_a_batch_are_what_the_whole_batch_gives_of_them(family: str) -> None:
    model = tiny_model(family, seed=1)
    for block in BlockStream(model, map_of(family, model), RunContext(windows(), batch=4)):
        for part in (slice(0, 1), slice(1, 3), slice(3, 9)):
            torch.testing.assert_close(block.output(0, part), block.output(0)[part])


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
                [make("gsq", {"scheme": "int3_g32", "steps": 5})],
                RunContext(windows(), batch=4, progress=progress, keep=keep),
            )

    with pytest.raises(Killed):
        run(Dying())
    resumed = run(Silent()).model
    whole, _ = compressed("llama_gqa", make("gsq", {"scheme": "int3_g32", "steps": 5}))
    assert torch.equal(logits(resumed), logits(whole))
