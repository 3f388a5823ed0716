from __future__ import annotations

import json
import os
import platform

import torch
from torch import nn

from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.footprint import bytes_on_disk, footprint, ideal_bytes, parameters
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import fit, round_to_codes
from tests.tiny_text import tiny_llama


def quantized(scheme_name: str, outputs: int, inputs: int) -> QuantLinear:
    scheme, weight = named_scheme(scheme_name), torch.randn(outputs, inputs)
    fitted = fit(weight, scheme.weights)
    return QuantLinear.from_fitted(scheme, round_to_codes(weight, fitted), fitted, None)


def test_bits_of_a_quantized_linear_by_hand():
    model = nn.Sequential(quantized("int4_g32_asym", 8, 64), nn.Linear(5, 3))
    codes, groups = 8 * 64 * 4, 8 * 2 * (32 + 4)  # float32 scales and 4-bit zero points
    assert parameters(model) == 8 * 64 + 5 * 3 + 3
    assert ideal_bytes(model) == (codes + groups) // 8 + 4 * 18


def test_tied_weights_count_once():
    model = tiny_llama()
    untied = parameters(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert untied - parameters(model) == model.lm_head.weight.numel()


def test_zeros_are_not_a_saving(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "full")
    full = footprint(model, tmp_path / "full")
    for parameter in model.parameters():
        parameter.data.zero_()
    model.save_pretrained(tmp_path / "zeros")
    assert footprint(model, tmp_path / "zeros") == full
    assert full.ideal_bits_per_weight == 32
    assert full.stored_bits_per_weight >= 32


def test_bytes_on_disk_are_those_of_the_weight_files_that_are_loaded(tmp_path):
    sizes = {"model-1.safetensors": 10, "model-2.safetensors": 20, "stale.safetensors": 40, "old.bin": 80, "x.json": 5}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    assert bytes_on_disk(tmp_path) == 70
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert bytes_on_disk(tmp_path) == 30


def test_environment_names_versions_and_machine_but_no_user_host_or_path():
    known = {**versions(), **machine()}
    assert known["torch"] == torch.__version__
    assert {"python", "transformers", "compressed-tensors", "llmcompress", "cpu", "cores", "memory", "gpu"} <= set(
        known
    )
    text = " ".join(known.values())
    assert platform.node() not in text.split()
    assert os.path.expanduser("~") not in text
