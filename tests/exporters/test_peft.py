"""Adapters beside codes, exported for PEFT: stock PEFT computes with them what our model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

import llmcompress
from llmcompress.errors import CompressError
from llmcompress.runners.base import RUNNERS
from tests.families import VOCABULARY
from tests.tiny_folder import write_tiny_llama

IDS = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
RECIPE = """
calibration: {{source: builtin:calibration, samples: 6, tokens: 48, batch: 4}}
passes:
  - {quantizer}
  - recover: {{rank: 3, training: {{steps: 4, batch: 4, learning_rate: 0.05}}}}
evaluate: {{}}
"""


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def made(tmp_path: Path, quantizer: str, **options: Any) -> tuple[PreTrainedModel, Path]:
    tiny = write_tiny_llama(tmp_path / "tiny", num_hidden_layers=2, hidden_size=64, intermediate_size=64)
    done = llmcompress.compress(str(tiny), RECIPE.format(quantizer=quantizer), tmp_path / "out")
    model: PreTrainedModel = done.exportable.model
    before = logits(model)
    llmcompress.export(done, "peft", tmp_path / "peft", options={"peft": options} if options else None)
    assert torch.equal(logits(model), before), "exporting leaves the model as it is"
    return model, tmp_path / "peft"


def stock(folder: Path) -> Any:
    """The quantized model as its README says: PEFT reads weights, which compressed-tensors restores."""
    quantized = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    as_weights = CompressedTensorsConfig(run_compressed=False) if "config_groups" in quantized else None
    given = {} if as_weights is None else {"quantization_config": as_weights}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)


@pytest.mark.parametrize(
    ("quantizer", "options", "apart"),
    [
        ("rtn: {scheme: int4_g16}", {}, 0.005),  # restored weights are rounded to bfloat16
        ("rtn: {scheme: int8_channel_a8token}", {}, 0.02),  # the last bit of an input moves it to the next code
        ("rtn: {scheme: int3_g16}", {"base": "plain"}, 0.005),  # and so are dequantized ones
        ("bnb_nf4: {exclude: ['*.k_proj', '*.v_proj']}", {}, 0.03),  # computes in bfloat16: a linear is 0.6 % off
    ],
    ids=["int4", "w8a8", "dequantized", "nf4"],
)
def test_stock_peft_loads_the_adapter_on_the_compressed_model(
    quantizer: str, options: dict[str, Any], apart: float, tmp_path: Path
) -> None:
    ours, folder = made(tmp_path, quantizer, **options)
    base = stock(folder)
    bare = logits(base)
    found = logits(peft.PeftModel.from_pretrained(base, folder / "adapter"))
    expected = logits(ours)
    difference = (found - expected).abs().max()
    assert difference < apart * expected.abs().max() and 5 * difference < (bare - expected).abs().max()
    report = json.loads((folder / "export_report.json").read_text())
    assert report["runtime"]["runtime"] == "PEFT" and report["runtime"]["same_top"] > 0.99


def test_files_have_the_names_that_peft_writes_itself(tmp_path: Path) -> None:
    _, folder = made(tmp_path, "rtn: {scheme: int4_g16}")
    peft.PeftModel.from_pretrained(stock(folder), folder / "adapter").save_pretrained(tmp_path / "again")
    ours, theirs = (peft.load_peft_weights(str(each)) for each in (folder / "adapter", tmp_path / "again"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name].float(), theirs[name].float()) for name in ours)


def test_what_peft_cannot_hold_is_refused(tmp_path: Path) -> None:
    tiny = write_tiny_llama(tmp_path / "tiny", num_hidden_layers=2, intermediate_size=64)
    quantized = "{passes: [{rtn: {scheme: int4_g16}}], evaluate: {}}"
    llmcompress.compress(str(tiny), quantized, tmp_path / "bare")
    with pytest.raises(CompressError, match="no adapters beside codes"):
        llmcompress.export(tmp_path / "bare", "peft", tmp_path / "a")
    llmcompress.compress(str(tiny), RECIPE.format(quantizer="rtn: {scheme: nf4_g16}"), tmp_path / "nf4")
    with pytest.raises(CompressError, match="stock loaders read"):
        llmcompress.export(tmp_path / "nf4", "peft", tmp_path / "b")
    with pytest.raises(CompressError, match="there is no adapter"):
        RUNNERS["peft"].open(str(tmp_path / "bare"), device=torch.device("cpu"), dtype=torch.float32)
