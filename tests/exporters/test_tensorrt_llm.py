"""TensorRT-LLM: files are those of ModelOpt with our codes, and what it would compute differently is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress import compress, footprint
from llmcompress.errors import CompressError
from llmcompress.exporters.base import Exact, Refused, Writing
from llmcompress.exporters.contents import CodedLinear, contents_in
from llmcompress.exporters.tensorrt_llm import TensorRtLlmExporter
from llmcompress.exporting import Exportable, export
from llmcompress.formats import tensorrt_llm
from llmcompress.loading.load import load
from llmcompress.model.skeleton import put_module
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.modules.kv_cache import CodedAttention
from llmcompress.modules.quant_linear import codes_of, quantized_linears
from llmcompress.modules.scheme import named_scheme
from llmcompress.records.export_report import ExportReport
from llmcompress.verification.verifying import verified
from tests.exporters.gguf_models import tiny, tokenizer
from tests.exporters.quantized import quantize
from tests.tiny_folder import write_tiny_llama

FACTS: dict[str, Any] = json.loads((Path(__file__).parent / "modelopt_facts.json").read_text())
"""What ModelOpt 0.47 wrote: see evals/tensorrt_llm.py."""
SCHEMES = {
    "W4A16_AWQ": "int4_g128_positive",
    "W8A16": "int8_channel",
    "W8A8_SQ_PER_CHANNEL": "int8_channel_a8tensor",
    "FP8": "fp8_tensor_a8tensor",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_channel_a8token",
    "NVFP4": "nvfp4_a",
    "W4A16_NVFP4": "nvfp4",
}
FAMILIES = {"gemma3_text": "gemma3"}
"""Names here, where they differ."""


def model_of(family: str, scheme: str | list[str], **config: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 1, **config}
    model = tiny(FAMILIES.get(family, family), **sizes)
    quantize(model, [scheme] if isinstance(scheme, str) else scheme)
    return model


def exported(model: PreTrainedModel, folder: Path) -> ExportReport:
    settings = model.generation_config
    exportable = Exportable(model, tokenizer(), "org/tiny", torch.bfloat16, settings)
    return export(exportable, TensorRtLlmExporter(), folder, overwrite=False)


def with_cache(model: PreTrainedModel, number: str = "fp8") -> PreTrainedModel:
    attention = model.model.layers[0].self_attn
    wrapper = CodedAttention(number, "tensor", "past_key_values", (2, 2), (32, 32))
    wrapper.key_scale, wrapper.value_scale = torch.tensor([0.015625]), torch.tensor([0.03125])
    wrapper.take(attention)
    put_module(model, "model.layers.0.self_attn", wrapper)
    return model


def named_alike(fact: dict[str, Any], family: str) -> dict[str, dict[str, Any]]:
    return {projection: row["parts"] for row in fact for projection in row["of"].get(family, [])}


@pytest.mark.parametrize("family", FACTS["families"])
@pytest.mark.parametrize("algorithm", ["W4A16_AWQ", "NVFP4"])
def test_every_family_has_the_tensors_that_modelopt_writes(family, algorithm, tmp_path):
    check_against_modelopt(family, algorithm, tmp_path)


@pytest.mark.parametrize("algorithm", sorted(SCHEMES.keys() - {"W4A16_AWQ", "NVFP4"}))
def test_every_format_has_the_tensors_and_the_config_that_modelopt_writes(algorithm, tmp_path):
    check_against_modelopt("qwen2", algorithm, tmp_path)


def check_against_modelopt(family: str, algorithm: str, folder: Path) -> None:
    model = model_of(family, SCHEMES[algorithm])
    stock = {name: tuple(each.shape) for name, each in tiny_stock(family).state_dict().items()}
    TensorRtLlmExporter().write(model, folder, Writing(torch.bfloat16))
    found = load_file(folder / "model.safetensors")
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in stock.items():
        owner = name.rpartition(".")[0]
        parts = named_alike(FACTS["tensors"][algorithm], family).get(owner.rpartition(".")[2])
        if parts is None and not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            wanted[name] = ("bfloat16", shape)
        elif parts is not None and name.endswith(".weight"):
            wanted |= {f"{owner}.{part}": (kind, sized(rule, shape)) for part, (kind, rule) in parts.items()}
    assert {name: (str(each.dtype).removeprefix("torch."), tuple(each.shape)) for name, each in found.items()} == wanted
    fact = FACTS["config"][algorithm]
    file = json.loads((folder / "hf_quant_config.json").read_text())
    inline = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert file["quantization"] == {**fact["hf_quant_config"], "exclude_modules": ["lm_head", "model.embed_tokens"]}
    assert inline["producer"]["name"] == file["producer"]["name"] == "llmcompress"
    assert {**fact["inline"], "producer": inline["producer"], "ignore": inline["ignore"]}.items() <= inline.items()
    assert inline.keys() - fact["inline"].keys() <= {"group_size", "has_zero_point", "pre_quant_scale"}


def tiny_stock(family: str) -> PreTrainedModel:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 1}
    return tiny(FAMILIES.get(family, family), **sizes)


def sized(rule: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    found = []
    for word in filter(None, rule.split("×")):
        axis, _, divisor = word.partition("/")
        found.append(dict(zip("OI", shape, strict=True))[axis] // int(divisor or 1))
    return tuple(found)


@pytest.mark.parametrize("algorithm", SCHEMES)
def test_what_modelopt_wrote_is_decoded_to_what_it_computes_with_and_packed_to_the_same_bytes(algorithm):
    stored = {part: tensor_of(each) for part, each in FACTS["samples"][algorithm].items()}
    weights = stored.pop("weights")
    read = tensorrt_llm.unpack(stored, algorithm)
    torch.testing.assert_close(read.dense(), weights, rtol=1e-6, atol=0)
    again = tensorrt_llm.pack(Quantized(read), algorithm, torch.bfloat16, alone=True)
    for part in ("weight", "weight_scale", "weight_scale_2"):
        if part in stored:
            assert again[part].dtype == stored[part].dtype and again[part].shape == stored[part].shape
            torch.testing.assert_close(again[part].float(), stored[part].float(), rtol=3e-7, atol=0)


def tensor_of(data: dict[str, Any]) -> Tensor:
    found = torch.frombuffer(bytearray(base64.b64decode(data["bytes"])), dtype=getattr(torch, data["dtype"]))
    return found.reshape(data["shape"])


def test_a_gptq_folder_means_the_same_as_read_nibble_by_nibble(tmp_path):
    model = model_of("llama", ["int4_g64_asym", "int3_g64_asym", "int4_g64_positive"])
    report = exported(model, tmp_path / "out")
    assert not report.differing and any("GPTQ" in note for note in report.notes)
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gptq" and config["checkpoint_format"] == "gptq_v2"
    assert (config["bits"], config["group_size"], config["desc_act"]) == (4, 64, False)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, module in quantized_linears(model).items():
        words, zeros = found[f"{name}.qweight"], found[f"{name}.qzeros"]
        scales = found[f"{name}.scales"].float()
        for o, i in ((0, 0), (9, 13), (module.out_features - 1, module.in_features - 1), (17, 64)):
            code = int(words[i // 8, o]) >> 4 * (i % 8) & 15
            zero = int(zeros[i // 64, o // 8]) >> 4 * (o % 8) & 15
            assert (code - zero) * float(scales[i // 64, o]) == float(module.dense_weight()[o, i])
        assert found[f"{name}.g_idx"].tolist() == [i // 64 for i in range(module.in_features)]


@pytest.mark.parametrize(
    ("scheme", "inputs", "nearest"),
    [
        ("int4_g128", 256, "int4_g128_positive"),
        ("int4_g32", 256, "int4_g64_positive"),
        ("int4_g32_asym", 192, "int4_g64_asym"),
        ("int3_channel", 256, "int3_g128_positive"),
        ("int4_g64_positive", 96, "int8_channel"),
        ("int8_g64", 256, "int8_channel"),
        ("int8_channel_a8token", 256, "int8_channel_a8tensor"),
        ("fp8_tensor", 256, "fp8_tensor_a8tensor"),
        ("fp8_g64", 256, "fp8_channel_a8token"),
        ("mxfp4_a", 256, "nvfp4_a"),
        ("nf4_g64", 256, "nvfp4"),
    ],
)
def test_what_it_cannot_hold_is_refused_with_the_nearest_scheme(scheme, inputs, nearest):
    answer = TensorRtLlmExporter().check(CodedLinear("x", named_scheme(scheme), 16, inputs), torch.bfloat16)
    assert isinstance(answer, Refused) and answer.why and answer.nearest and answer.nearest.name == nearest
    offered = TensorRtLlmExporter().check(CodedLinear("x", answer.nearest, 16, inputs), torch.bfloat16)
    assert isinstance(offered, Exact)


def test_linears_that_are_merged_while_loading_need_one_scheme():
    model = model_of("llama", ["int8_channel", "fp8_channel_a8token"])
    answers = TensorRtLlmExporter().answers(contents_in(model, torch.bfloat16))
    merged = {name for name, each in answers.items() if isinstance(each, Refused)}
    assert {name.rpartition(".")[2] for name in merged} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


def test_merged_nvfp4_matrices_share_the_second_scale_and_keep_their_weights(tmp_path):
    model = model_of("llama", "nvfp4_a")
    value = codes_of(model.model.layers[0].self_attn.v_proj)
    value.shared_scale = (value.quantized.shared_scale * 4).view(torch.int32)  # a quarter of the weights
    report = exported(model, tmp_path / "out")
    assert not report.differing
    found = load_file(tmp_path / "out" / "model.safetensors")
    at = "model.layers.0.self_attn"
    assert len({float(found[f"{at}.{each}_proj.weight_scale_2"]) for each in "qkv"}) == 1
    value.shared_scale = (value.quantized.shared_scale * 2**12).view(torch.int32)
    with pytest.raises(CompressError, match="one second scale for q_proj, k_proj, v_proj"):
        exported(model, tmp_path / "no")


def test_fp8_scales_that_a_loader_merges_are_told_and_equal_ones_are_not():
    model, exporter = model_of("llama", "fp8_tensor_a8tensor"), TensorRtLlmExporter()
    answers = exporter.answers(contents_in(model, torch.bfloat16))
    told = {name.rpartition(".")[2] for name, each in answers.items() if isinstance(each, Exact) and each.doubt}
    assert told == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    for name in ("gate_proj", "up_proj"):
        codes_of(model.get_submodule(f"model.layers.0.mlp.{name}")).scale_OG.fill_(0.25)
    answers = exporter.answers(contents_in(model, torch.bfloat16))
    assert not any(each.doubt for name, each in answers.items() if "mlp" in name and isinstance(each, Exact))


def test_several_schemes_are_a_mixed_precision_checkpoint(tmp_path):
    model = tiny("llama", hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=2)
    quantize(model.model.layers[0].self_attn, ["fp8_channel_a8token"])
    for block, scheme in ((0, "nvfp4_a"), (1, "int4_g64_positive")):
        holder = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([model.model.layers[block].mlp])})
        quantize(holder, [scheme])
    report = exported(model, tmp_path / "out")
    assert not report.differing
    file = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert file["quant_algo"] == "MIXED_PRECISION" and file["quantized_layers"]["model.layers.1.mlp.up_proj"] == {
        "quant_algo": "W4A16_AWQ",
        "group_size": 64,
        "has_zero_point": False,
        "pre_quant_scale": True,
    }
    assert file["quantized_layers"]["model.layers.0.mlp.up_proj"] == {"quant_algo": "NVFP4", "group_size": 16}
    assert "lm_head" not in file["quantized_layers"]


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_an_fp8_kv_cache_has_its_scales_where_modelopt_puts_them(family, tmp_path):
    model = with_cache(model_of(family, "fp8_channel_a8token"))
    before = list(model.state_dict())
    report = exported(model, tmp_path / "out")
    assert list(model.state_dict()) == before  # the wrapper is back
    found = load_file(tmp_path / "out" / "model.safetensors")
    at = "model.layers.0.self_attn"
    assert found[f"{at}.k_proj.k_scale"].shape == () and found[f"{at}.k_proj.k_scale"].dtype == torch.float32
    assert (float(found[f"{at}.k_proj.k_scale"]), float(found[f"{at}.v_proj.v_scale"])) == (0.015625, 0.03125)
    rows = {row.source: row for row in report.read_back}
    assert not report.differing and {f"{at}.k_proj.k_scale", f"{at}.o_proj"} <= rows.keys()
    fact = FACTS["config"]["FP8-kv"]
    file = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    inline = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert file["kv_cache_quant_algo"] == fact["hf_quant_config"]["kv_cache_quant_algo"] == "FP8"
    assert inline["kv_cache_scheme"] == fact["inline"]["kv_cache_scheme"]
    assert any("scale 1" in note for note in report.notes)
    assert not verified(tmp_path / "out", name="out").failed


def test_an_int8_kv_cache_another_family_and_float32_are_refused():
    exporter = TensorRtLlmExporter()
    cached = contents_in(with_cache(model_of("llama", "int8_channel"), "int8"), torch.bfloat16)
    assert "not model.layers.0.self_attn" in str(exporter.problem(cached))
    assert "`gpt2` is none" in str(exporter.problem(contents_in(tiny_gpt2(), torch.bfloat16)))
    assert "bfloat16 or float16" in str(exporter.problem(contents_in(model_of("llama", "int8_channel"), torch.float32)))


def tiny_gpt2() -> PreTrainedModel:
    from tests.families import tiny_model

    return tiny_model("gpt2")


def test_the_folder_says_that_it_was_not_run_and_pytorch_refuses_it(tmp_path):
    report = exported(model_of("llama", "fp8_channel_a8token"), tmp_path / "out")
    assert report.runtime is None and "NVIDIA GPU" in str(report.not_run)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "It was not run here: it needs TensorRT-LLM" in text and "trtllm-serve ." in text
    with pytest.raises(CompressError, match="without their scales") as refused:
        load(tmp_path / "out")
    assert refused.value.code == "model.other-runtime" and "trtllm-serve" in refused.value.fix
    assert footprint(tmp_path / "out").codes == 147456
    checks = verified(tmp_path / "out", name="out", deep=True, fresh=never).checks
    assert {each.name: each.result for each in checks}["reload"] == "skipped"


def never(*_: object) -> str:
    raise AssertionError("stock transformers would read codes as weights")


def test_a_recipe_that_names_it_is_rounded_with_positive_scales(tmp_path):
    source = write_tiny_llama(tmp_path / "source", intermediate_size=128, hidden_size=64)
    recipe = {"passes": [{"rtn": {"scheme": "int4_g64"}}], "export": ["tensorrt_llm"], "evaluate": {}}
    compress(source, {**recipe, "save": {"dtype": "bfloat16"}}, tmp_path / "out")
    found = load_file(tmp_path / "out-tensorrt_llm" / "model.safetensors")
    scales = [each for name, each in found.items() if name.endswith("weight_scale")]
    assert scales and all((each > 0).all() for each in scales)
