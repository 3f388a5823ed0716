"""GPTQ folders: codes are carried bit for bit in the layout of the field, and what it cannot hold is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmcompress import compress, export
from llmcompress.errors import CompressError
from llmcompress.evaluation.checkpoint_codes import codes_in
from llmcompress.exporters.base import Converted, Exact, Refused
from llmcompress.exporters.contents import CodedLinear, contents_in
from llmcompress.exporters.gptq import GptqExporter
from llmcompress.formats import gptq
from llmcompress.formats.gptq import Layout
from llmcompress.formats.named import kinds
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.modules.quant_linear import quantized_linears
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.quantized import QuantizedTensor, regrouped
from llmcompress.numerics.ranges import fit
from tests.exporters.gguf_models import tiny, tiny_quantized, tokenizer


def form(name: str, shape: tuple[int, int] = (64, 96)) -> Quantized:
    scheme, generator = named_scheme(name), torch.Generator().manual_seed(1)
    weight_OI = torch.randn(shape, generator=generator) + 0.3
    fitted = fit(weight_OI, scheme.weights, scale_dtype=torch.bfloat16)
    tensor = QuantizedTensor.of(round_to_codes(weight_OI, fitted), fitted)
    bias_O = torch.randn(shape[0], generator=generator).bfloat16()
    return Quantized(replace(tensor, scale=tensor.scale.bfloat16()), bias=bias_O)


def textbook_words(fields: list[int], bits: int) -> list[int]:
    """One big number, lowest field first, cut into words of 32 bits."""
    whole = sum(field << (bits * place) for place, field in enumerate(fields))
    return [whole >> (32 * word) & 0xFFFFFFFF for word in range(len(fields) * bits // 32)]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", gptq.WIDTHS)
@pytest.mark.parametrize("ending", ["g32", "channel", "g32_asym"])
def test_words_are_those_of_a_plain_loop_and_come_back(bits: int, ending: str, version: gptq.Version) -> None:
    given = form(f"int{bits}_{ending}")
    tensor, symmetric = given.tensor, not ending.endswith("asym")
    if version == 1 and tensor.zero_point is not None:
        lowest = -(2 ** (bits - 1))
        given = replace(given, tensor=replace(tensor, zero_point=tensor.zero_point.clamp(lowest + 1)))
    layout = Layout(bits, given.tensor.grid.group, symmetric, version)
    stored = gptq.pack(given, layout, torch.bfloat16)
    middle, words = 2 ** (bits - 1), stored["qweight"].long() & 0xFFFFFFFF
    for output in (0, 17, 63):
        fields = [int(code) + middle for code in given.tensor.codes[output]]
        assert words[:, output].tolist() == textbook_words(fields, bits)
    zero_OG = torch.zeros_like(given.tensor.scale) if symmetric else given.tensor.zero_point
    for group in range(zero_OG.shape[1]):
        fields = [int(zero) + middle - (1 if version == 1 else 0) for zero in zero_OG[:, group]]
        assert (stored["qzeros"][group].long() & 0xFFFFFFFF).tolist() == textbook_words(fields, bits)
    again = gptq.unpack(stored, layout, torch.bfloat16)
    assert torch.equal(again.codes, given.tensor.codes) and torch.equal(again.scale, given.tensor.scale)
    assert symmetric or torch.equal(again.zero_point, given.tensor.zero_point)
    assert stored["scales"].dtype == torch.float16 and stored.keys() - {"bias"} == gptq.NAMES
    length = given.tensor.grid.length(96)
    assert stored["g_idx"].tolist() == [place // length for place in range(96)]
    foretold = gptq.tensors((64, 96), given.scheme, layout, torch.bfloat16, bias=True)
    assert foretold == kinds(stored)


@pytest.mark.parametrize("name", ["int4_channel", "int4_g64", "int4_g64_asym", "int8_channel_asym"])
def test_repeated_scales_stand_for_the_same_weights(name: str) -> None:
    given = form(name).tensor
    again = regrouped(given, 32)
    assert again.scale.shape == (64, 3) and torch.equal(again.dense(), given.dense())


@pytest.mark.parametrize(
    ("schemes", "base", "dynamic"),
    [
        (["int4_g32"], (4, 32, True, "gptq"), 0),
        (["int4_g32_asym"], (4, 32, False, "gptq_v2"), 0),
        (["int4_g64", "int4_g32", "int4_channel"], (4, 32, True, "gptq"), 0),
        (["int3_channel"], (3, -1, True, "gptq"), 0),
        (["int4_g32", "int4_g32", "int8_g32"], (4, 32, True, "gptq"), 1),
        (["int5_g32", "ternary_g32"], (8, 32, True, "gptq"), 1),
    ],
)
def test_a_folder_reads_back_as_it_was_and_its_config_says_what_is_there(schemes, base, dynamic, tmp_path) -> None:
    model = tiny_quantized("llama", schemes)
    report = export(model, "gptq", tmp_path / "out", tokenizer=tokenizer(), run=False)["gptq"]
    coded = [row for row in report.read_back if row.codes_differing is not None]
    assert len(coded) == len(quantized_linears(model)) and all(row.is_same for row in report.read_back)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"], config["checkpoint_format"]) == base
    assert bool(config.get("dynamic")) == bool(dynamic)
    for site in codes_in(tmp_path / "out").coded:
        patterns = [said for pattern, said in config.get("dynamic", {}).items() if re.match(pattern[2:], site.name)]
        assert patterns == ([] if site.grid.bits == config["bits"] else [{"bits": site.grid.bits, "sym": True}])


def test_a_dense_linear_among_codes_is_named_as_dense(tmp_path: Path) -> None:
    model = tiny_quantized("llama", ["int4_g32"])
    site = model.get_submodule("model.layers.0.mlp.down_proj")
    dense = torch.nn.Linear(site.in_features, site.out_features, bias=False)
    model.model.layers[0].mlp.down_proj = dense
    export(model, "gptq", tmp_path / "out", tokenizer=tokenizer(), run=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["dynamic"] == {r"-:model\.layers\.0\.mlp\.down_proj$": {}}
    assert "model.layers.0.mlp.down_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_scales_that_float16_rounds_are_told_and_a_lowest_zero_point_needs_version_2() -> None:
    model, exporter = tiny_quantized("llama", ["int4_g32_asym"]), GptqExporter()
    site = model.get_submodule("model.layers.0.self_attn.k_proj")
    assert isinstance(exporter.answers(contents_in(model, torch.bfloat16))["model.layers.0.self_attn.k_proj"], Exact)
    site.scale_OG = site.scale_OG * 1.001
    answer = exporter.answers(contents_in(model, torch.float32))["model.layers.0.self_attn.k_proj"]
    assert isinstance(answer, Converted) and answer.keeps_codes and "float16" in answer.why
    site.scale_OG = site.scale_OG * 2.0**-25
    answer = exporter.answers(contents_in(model, torch.float32))["model.layers.0.self_attn.k_proj"]
    assert isinstance(answer, Refused)
    other = model.get_submodule("model.layers.0.self_attn.v_proj")
    other.zero_OG[0, 0] = -8
    answer = GptqExporter(version=1).answers(contents_in(model, torch.float32))["model.layers.0.self_attn.v_proj"]
    assert isinstance(answer, Refused) and "`version`" in answer.why


@pytest.mark.parametrize(
    ("scheme", "outputs", "inputs", "nearest"),
    [
        ("int4_g8", 64, 192, "int4_g16"),
        ("nf4_g64", 64, 128, "int4_g64"),
        ("int8_channel_a8token", 64, 64, "int8_channel"),
    ],
)
def test_what_it_cannot_hold_is_refused(scheme: str, outputs: int, inputs: int, nearest: str) -> None:
    answer = GptqExporter().check(CodedLinear("x", named_scheme(scheme), outputs, inputs), torch.bfloat16)
    assert isinstance(answer, Refused) and answer.why
    assert answer.nearest is not None and answer.nearest.name == nearest
    odd = GptqExporter().check(CodedLinear("x", named_scheme("int4_g32"), 48, 64), torch.bfloat16)
    assert isinstance(odd, Refused) and "48 outputs" in odd.why


@pytest.mark.parametrize("scheme", ["int4_g48", "int4_g128", "int4_g256", "int4_channel"])
def test_groups_that_consist_of_its_own_are_held(scheme: str) -> None:
    exporter, site = GptqExporter(), CodedLinear("x", named_scheme(scheme), 64, 192)
    assert isinstance(exporter.check(site, torch.bfloat16), Exact)
    groups = {"int4_g48": 16, "int4_g128": 64}
    scales = exporter.tensors(site, torch.bfloat16)["scales"]
    assert scales == (torch.float16, (192 // groups.get(scheme, 192), 64))


def test_models_of_more_than_codes_in_linears_are_refused(tmp_path: Path) -> None:
    model = tiny_quantized("llama", ["nf4_g32"])
    with pytest.raises(CompressError, match="gptq cannot represent this model: it supports only integers"):
        export(model, "gptq", tmp_path / "out", tokenizer=tokenizer(), run=False)


def test_a_table_in_codes_is_refused_by_name(tmp_path: Path) -> None:
    passes = [{"rtn": {"scheme": "int4_g32"}}, "embeddings"]
    made = compress(tiny("llama_tied_biased"), {"passes": passes, "evaluate": {}}, tokenizer=tokenizer())
    with pytest.raises(CompressError, match=r"embed_tokens"):
        export(made, "gptq", tmp_path / "out", run=False)
    assert not (tmp_path / "out").exists()
