"""GGUF: codes are carried bit for bit, what cannot be held is refused, and a faulty file is not published."""

from __future__ import annotations

import json
from pathlib import Path

import gguf as package
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llmcompress import export
from llmcompress.errors import CompressError, ExitCode
from llmcompress.exporters.base import Converted, Exact, Refused
from llmcompress.exporters.config import spelled_for_both
from llmcompress.exporters.contents import CodedLinear, contents_in
from llmcompress.exporters.gguf import FILE, GgufExporter
from llmcompress.exporters.gguf_architectures import config_problem, notes_of, settings_of
from llmcompress.exporters.gguf_tokenizer import tokenizer_settings
from llmcompress.modules.scheme import named_scheme
from llmcompress.reopening import reopen
from tests.exporters.gguf_models import MODELS, tiny, tiny_quantized, tokenizer, written
from tests.exporters.quantized import quantize

IDS_BT = torch.arange(3, 23).reshape(2, 10)


def metadata(file: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in package.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_every_architecture_reads_back_as_it_was(name: str, tmp_path: Path) -> None:
    model, exporter = tiny_quantized(name), GgufExporter()
    contents = contents_in(model, torch.bfloat16)
    assert exporter.problem(contents) is None
    assert all(isinstance(answer, Exact) for answer in exporter.answers(contents).values())
    rows = exporter.read_back(model, tmp_path, written(model, tmp_path))
    assert all(row.is_same for row in rows) and {row.stored_as for row in rows} == {
        "BF16",
        "F32",
        "Q4_0",
        "Q5_0",
        "Q8_0",
    }
    coded = [row for row in rows if row.codes_differing is not None]
    coded_weights = sum(site.outputs * site.inputs for site in contents.sites)
    assert sum(row.values for row in coded) == coded_weights and all(row.rounding_in_steps == 0 for row in coded)


def test_k_quants_and_ternary_codes_are_carried_as_they_are_and_transformers_reads_them(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 1}
    model = tiny("llama_tied_biased", **sizes)
    quantize(model, [*(f"q{bits}_k" for bits in range(2, 7)), "ternary_g256", "q4_k"])
    contents, exporter = contents_in(model, torch.bfloat16), GgufExporter(ternary="TQ1_0")
    assert all(isinstance(answer, Exact) for answer in exporter.answers(contents).values())
    assert exporter.notes(contents, exporter.answers(contents)) == []
    rows = exporter.read_back(model, tmp_path, written(model, tmp_path, exporter=exporter))
    assert all(row.is_same and not row.rounding_in_steps for row in rows)
    kinds = {f"Q{bits}_K" for bits in range(2, 7)}
    assert {row.stored_as for row in rows} == {*kinds, "TQ1_0", "F32", "BF16"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, dtype=torch.float32, config=model.config)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS_BT).logits, model(IDS_BT).logits, rtol=0, atol=1e-5)


def test_experts_of_a_block_that_have_different_schemes_are_refused() -> None:
    model = tiny_quantized("mixtral", ["int4_g32", "int8_channel"])
    assert "different schemes" in (GgufExporter().problem(contents_in(model, torch.bfloat16)) or "")


@pytest.mark.parametrize("name", ["llama", "llama_tied_biased", "qwen2"])
def test_transformers_reads_the_same_logits_from_the_file(name: str, tmp_path: Path) -> None:
    model = tiny_quantized(name)
    written(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, dtype=torch.float32, config=model.config)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS_BT).logits, model(IDS_BT).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("scheme", "inputs", "nearest"),
    [
        ("int4_g16", 64, "int4_g32"),
        ("int4_g48", 192, "int4_g32"),
        ("int8_g32_asym", 64, "int8_g32"),
        ("fp8_channel", 64, "int8_channel"),
        ("nf4_g64", 128, "int4_g64"),
        ("int8_channel_a8token", 64, "int8_channel"),
        ("int4_channel", 100, None),
        ("q2_k", 576, "int4_g32"),
        ("q4_k", 576, "int5_g32"),
        ("q5_k", 576, "int5_g32_asym"),
        ("q6_k", 576, "int8_g32"),
        ("q6_k", 100, None),
    ],
)
def test_what_it_cannot_hold_is_refused_with_the_nearest_scheme(scheme: str, inputs: int, nearest: str | None) -> None:
    answer = GgufExporter().check(CodedLinear("x", named_scheme(scheme), 8, inputs), torch.bfloat16)
    assert isinstance(answer, Refused) and answer.why
    assert (answer.nearest.name if answer.nearest else None) == nearest


def test_the_option_instead_says_aloud_what_becomes_of_it(tmp_path: Path) -> None:
    model = tiny_quantized("llama", ["nf4_g32", "int4_g32"])
    with pytest.raises(CompressError) as refused:
        export(model, "gguf", tmp_path / "no", tokenizer=tokenizer(), run=False)
    assert "no type of GGUF holds nf4_g32" in refused.value.what and "`instead`" in refused.value.fix
    for instead, kind in (("dense", "F32"), ("Q8_0", "Q8_0")):
        options = {"gguf": {"instead": instead}}
        made = export(model, "gguf", tmp_path / instead, tokenizer=tokenizer(), options=options, run=False)["gguf"]
        assert made.converted and all("no type of GGUF holds nf4_g32" in why for why in made.converted.values())
        stored = {row.source: row for row in made.read_back}
        assert all(stored[name].stored_as == kind for name in made.converted)
        second = [stored[name].weights_differing for name in made.converted]
        assert all(each == 0 for each in second) if instead == "dense" else all(each is None for each in second)
    with pytest.raises(CompressError, match="instead") as wrong:
        export(model, "gguf", tmp_path / "x", tokenizer=tokenizer(), options={"gguf": {"instead": "Q9"}})
    assert wrong.value.exit_code is ExitCode.USAGE


def test_minima_and_scales_that_float16_rounds_are_said_and_beyond_a_limit_refused() -> None:
    model, exporter = tiny_quantized("llama", ["int4_g32_asym", "int4_g32"]), GgufExporter()
    name = "model.layers.0.self_attn.k_proj"
    answers = exporter.answers(contents_in(model, torch.bfloat16))
    assert all(isinstance(each, Exact | Converted) for each in answers.values()) and isinstance(answers[name], Exact)
    asymmetric = [each for site, each in answers.items() if isinstance(each, Converted)]
    assert asymmetric and all(each.keeps_codes and "minima" in each.why for each in asymmetric)
    site = model.get_submodule(name)
    site.scale_OG = site.scale_OG * 2.0**-30
    refused = exporter.answers(contents_in(model, torch.float32))[name]
    assert isinstance(refused, Refused) and "float16" in refused.why


def test_a_file_that_does_not_hold_the_model_is_kept_aside_and_not_published(tmp_path: Path, monkeypatch) -> None:
    model = tiny_quantized("llama")
    write = GgufExporter.write

    def damaged(self, *given):
        saved = write(self, *given)
        file = given[1] / FILE
        content = bytearray(file.read_bytes())
        content[-40] ^= 1
        file.write_bytes(content)
        return saved

    monkeypatch.setattr(GgufExporter, "write", damaged)
    with pytest.raises(CompressError) as told:
        export(model, "gguf", tmp_path / "out", tokenizer=tokenizer(), run=False)
    assert (told.value.code, told.value.exit_code) == ("export.mismatch", ExitCode.GATE)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.faulty" / FILE).is_file()


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "with `silu`, and this config says `gelu`"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "kind `dynamic`"),
        ("gemma2", {"query_pre_attn_scalar": 224}, "root of the head's size"),
        ("gemma3", {"layer_types": ["full_attention"] * 6}, "every 6th block"),
        ("qwen3", {"attention_bias": True}, "attention_bias = False"),
    ],
)
def test_a_config_that_llama_cpp_computes_differently_is_refused(name: str, changes: dict, reason: str) -> None:
    assert config_problem(spelled_for_both(tiny(name).config)) is None
    problem = config_problem(spelled_for_both(tiny(name, **changes).config))
    assert problem is not None and reason in problem


def test_a_family_without_a_row_is_refused_by_name() -> None:
    assert "`gpt2` is none of" in str(config_problem({"model_type": "gpt2"}))


def test_a_window_that_llama_cpp_does_not_compute_limits_the_context() -> None:
    config = spelled_for_both(tiny("mistral", sliding_window=48).config)
    assert config_problem(config) is None and settings_of(config)["llama.context_length"] == 48
    assert "48 tokens" in notes_of(config)[0]


def test_tokenizer_and_chat_template_are_in_the_file(tmp_path: Path) -> None:
    ours = tokenizer()
    ours.chat_template = "{{ messages[0]['content'] }}"
    settings = tokenizer_settings(ours, 288)
    assert (settings["tokenizer.ggml.model"], settings["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert settings["tokenizer.chat_template"] == ours.chat_template
    written(tiny_quantized("llama"), tmp_path)
    found = metadata(tmp_path / FILE)
    assert found["tokenizer.ggml.tokens"] == ours.convert_ids_to_tokens(range(280)) + [
        f"[PAD{i}]" for i in range(280, 288)
    ]
    assert found["tokenizer.ggml.token_type"][:3] == [3, 3, 1] and found["tokenizer.ggml.bos_token_id"] == 0
    assert found["general.name"] == "tiny" and found["general.architecture"] == "llama"


def test_a_sentencepiece_like_tokenizer_keeps_the_order_of_its_merges() -> None:
    from tokenizers import Tokenizer, models, normalizers

    words = ["<unk>", "<s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab")]
    backend = Tokenizer(
        models.BPE({word: number for number, word in enumerate(words)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spm = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    settings = tokenizer_settings(spm, len(words))
    assert (settings["tokenizer.ggml.model"], settings["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    scores = dict(zip(settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.scores"], strict=True))
    assert scores["ab"] > scores["▁a"] > scores["▁ab"] > scores["a"]
    kinds = settings["tokenizer.ggml.token_type"]
    assert (kinds[0], kinds[1], kinds[2], kinds[-1]) == (2, 3, 6, 1)


def test_text_that_is_split_in_an_unknown_way_is_refused() -> None:
    from tokenizers import pre_tokenizers

    ours = tokenizer()
    ours.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(CompressError, match="does not compute text split by Punctuation"):
        tokenizer_settings(ours, 288)


@pytest.mark.parametrize("save", ["compressed-tensors", "llmcompress"])
def test_a_saved_folder_holds_its_codes_again_and_exports_them(save: str, tmp_path: Path) -> None:
    from llmcompress import compress
    from tests.tiny_folder import write_tiny_llama

    source = write_tiny_llama(tmp_path / "source", intermediate_size=64)
    passes = [{"rtn": {"scheme": "int4_g32", "overrides": {"*.mlp.*": {"scheme": "int4_g32_asym"}}}}]
    made = compress(source, {"passes": passes, "save": {"format": save}, "evaluate": {}}, tmp_path / "out")
    opened = reopen(str(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(opened.model(IDS_BT).logits, made.model(IDS_BT).logits)
    for name, site in contents_in(made.model, torch.bfloat16).modules.items():
        again = opened.model.get_submodule(name)
        assert torch.equal(again.dense_weight(), site.dense_weight()) and again.scheme == site.scheme
    report = export(tmp_path / "out", "gguf", tmp_path / "gguf", run=False)["gguf"]
    assert not report.differing and {row.stored_as for row in report.read_back} == {"Q4_0", "Q4_1", "BF16", "F32"}
    names = {path.name for path in (tmp_path / "gguf").iterdir()}
    assert {
        FILE,
        "README.md",
        "export_report.json",
        "tokenizer.json",
        "config.json",
        "llmcompress_recipe.yaml",
    } <= names
    assert json.loads((tmp_path / "gguf" / "export_report.json").read_text())["target"] == "gguf"
    assert str(tmp_path) not in (tmp_path / "gguf" / "README.md").read_text()


@pytest.mark.parametrize("target", ["plain", "compressed-tensors", "llmcompress"])
def test_folders_for_transformers_are_read_back_too(target: str, tmp_path: Path) -> None:
    model = tiny_quantized("llama_tied_biased", ["int4_g32", "int3_g32_asym", "int8_channel", "fp8_channel"])
    report = export(model, target, tmp_path / "out", tokenizer=tokenizer(), run=False)[target]
    assert report.read_back and not report.differing
    coded = [row for row in report.read_back if row.codes_differing is not None]
    assert len(coded) == (0 if target == "plain" else 14)
