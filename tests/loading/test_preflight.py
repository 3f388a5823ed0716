"""Every fault of a model is found before any work, in words that name the file, the tensor and the way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, MixtralConfig, OPTConfig

from llmcompress.errors import CompressError, ExitCode
from llmcompress.loading.config import read_config
from llmcompress.loading.preflight import preflight
from llmcompress.loading.source import Source
from llmcompress.loading.tensors import headers
from llmcompress.progress import Silent
from tests.tiny_folder import edit_json, edit_tensors, raw_safetensors, with_a_far_token, write_tiny_llama

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pristine_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("shards"), shard="30KB")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "model")


@pytest.fixture
def shards(pristine_shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine_shards, tmp_path / "model")


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is read and no linear runs, whatever the fault."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("preflight computed something")

    monkeypatch.setattr(nn.Linear, "forward", refuse)
    monkeypatch.setattr("llmcompress.loading.weights.safe_open", refuse)


def refused(folder: Path, *parts: str) -> CompressError:
    """The error, which must name all `parts` and a fix."""
    with pytest.raises(CompressError) as caught:
        preflight(Source(folder, str(folder)))
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in:\n{caught.value}"
    assert caught.value.fix
    assert caught.value.exit_code is ExitCode.REFUSED
    return caught.value


def test_a_sound_model_passes_without_warnings(folder):
    found = preflight(Source(folder, "tiny"))
    assert found.warnings == ()
    assert found.storage_dtype is torch.bfloat16
    assert found.bytes_weights == (folder / "model.safetensors").stat().st_size
    assert found.headers[Q].shape == (32, 32) and found.headers[Q].bytes == 32 * 32 * 2
    assert found.contents.embedding_rows == 288 and not found.contents.tied
    assert set(found.contents.shapes) == set(found.headers)


def test_shards_and_one_file_hold_the_same_tensors(pristine, pristine_shards):
    one, many = headers(pristine), headers(pristine_shards)
    assert {n: (h.dtype, h.shape) for n, h in one.items()} == {n: (h.dtype, h.shape) for n, h in many.items()}
    assert len({h.file for h in many.values()}) > 1


# A1 … A3: damaged files


def test_a1_truncated_file_names_it_and_both_sizes(folder):
    file = folder / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2])
    refused(folder, "model.damaged-file", file.name, f"{size:,}", f"{size // 2:,}", "--force-download")


def test_a1_all_truncated_shards_are_listed(shards):
    files = sorted(shards.glob("model-*.safetensors"))[:2]
    for file in files:
        file.write_bytes(file.read_bytes()[:-5])
    refused(shards, *(file.name for file in files))


@pytest.mark.parametrize("content", [b"", b"12345", bytes(range(1, 200)), b"\x10\0\0\0\0\0\0\0not a header !!!"])
def test_a2_a3_empty_or_random_file_is_named(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "model.damaged-file", "model.safetensors", "--force-download")


def test_a1_tensor_whose_bytes_do_not_fit_its_shape_is_named(folder):
    raw_safetensors(
        folder / "model.safetensors", {"odd": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"\0" * 8
    )
    refused(folder, "odd", "12", "8")


# A4 … A6: missing and wrong


def test_a4_all_missing_shards_are_listed(shards):
    gone = sorted(shards.glob("model-*.safetensors"))[1:3]
    for file in gone:
        file.unlink()
    refused(shards, "model.missing-file", *(file.name for file in gone), "hf download")


def test_a5_missing_tensors_are_listed(folder):
    up = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder / "model.safetensors", **{Q: None, up: None})
    refused(folder, "model.missing-tensor", Q, up, "2 tensors")


def test_a5_tensor_listed_in_the_index_and_absent_from_its_shard_is_named(shards):
    weight_map = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    edit_tensors(shards / weight_map[Q], **{Q: None})
    refused(shards, "model.missing-tensor", Q, weight_map[Q])


def test_a5_missing_head_offers_tying(folder):
    edit_tensors(folder / "model.safetensors", lm_head__weight=None)
    refused(folder, "lm_head.weight", "tie_word_embeddings")


def test_a6_wrong_shape_names_tensor_both_shapes_and_config_field(folder):
    edit_json(folder / "config.json", intermediate_size=40)
    refused(
        folder,
        "model.wrong-shape",
        "model.layers.1.mlp.down_proj.weight: [32, 48] in the checkpoint, [32, 40] expected",
        "intermediate_size = 40",
    )


# A8 … A13: not a dense causal language model


def test_a8_broken_config_names_line_and_column(folder):
    (folder / "config.json").write_text('{\n "model_type": "llama",\n "hidden_size" 3\n}')
    refused(folder, "model.bad-json", "config.json", "line 3", "column")


def test_a8_config_with_values_of_the_wrong_kind_is_refused(folder):
    edit_json(folder / "config.json", num_hidden_layers="two")
    refused(folder, "model.bad-config", "config.json")


def test_missing_config_is_refused(folder):
    (folder / "config.json").unlink()
    refused(folder, "model.no-config")


@pytest.mark.parametrize(("model_type", "part"), [(None, "no model_type"), ("lllama9", "'lllama9'")])
def test_a9_no_or_unknown_model_type_is_refused(folder, model_type, part):
    edit_json(folder / "config.json", model_type=model_type)
    refused(folder, "model.unknown-type", part)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "BertForMaskedLM"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "T5ForConditionalGeneration"),
        ({"architectures": None, "is_encoder_decoder": True}, "encoder-decoder"),
        ({"vision_config": {"hidden_size": 4}}, "multimodal"),
        ({"architectures": None, "model_type": "clip_text_model"}, "clip_text_model"),
    ],
)
def test_a10_models_of_other_kinds_are_refused_by_name(folder, changes, part):
    edit_json(folder / "config.json", **changes)
    refused(folder, "model.not-causal", part)


def test_a10_diffusion_pipeline_is_refused(folder):
    (folder / "config.json").rename(folder / "model_index.json")
    refused(folder, "model.not-causal", "diffusion")


def test_a11_quantized_model_is_refused(folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, "model.already-quantized", "gptq, 4 bits")


def test_a11_codes_without_a_quantization_config_are_refused(folder):
    edit_tensors(folder / "model.safetensors", **{Q: torch.zeros(32, 32, dtype=torch.int8)})
    refused(folder, "model.already-quantized", Q, "int8")


def test_a12_adapter_is_refused_with_the_way_to_merge(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    refused(folder, "model.adapter", "org/base", "merge_and_unload")


@pytest.mark.parametrize(("name", "part"), [("pytorch_model.bin", "pickles"), ("model-q4.gguf", "GGUF")])
def test_a13_pickles_and_gguf_are_refused(folder, name, part):
    (folder / "model.safetensors").rename(folder / name)
    error = refused(folder, "model.no-safetensors", name, part)
    assert "weights_only" not in str(error)


def test_shards_without_their_index_are_refused(shards):
    (shards / "model.safetensors.index.json").unlink()
    refused(shards, "model.no-safetensors", "model.safetensors.index.json")


# A15, A16


def test_a15_mixed_dtypes_are_reported_and_the_usual_one_is_stored(folder):
    edit_tensors(folder / "model.safetensors", model__norm__weight=torch.ones(32))
    found = preflight(Source(folder, "tiny"))
    assert found.storage_dtype is torch.bfloat16
    assert any("float32: 1 tensors" in warning for warning in found.warnings)


def test_a16_tied_model_holds_its_head_once(tmp_path):
    found = preflight(Source(write_tiny_llama(tmp_path, tie_word_embeddings=True), "tied"))
    assert found.contents.tied and found.contents.stored_twice is None
    assert "lm_head.weight" not in found.contents.shapes


# A20 … A24


def test_a20_token_ids_beyond_the_embedding_are_named_in_a_warning(folder):
    """As `<image_soft_token>` of Gemma 3's text models; texts with one are refused: test_tokens.py."""
    with_a_far_token(folder)
    (warning,) = preflight(Source(folder, "tiny")).warnings
    assert all(part in warning for part in ("288 rows", "13 tokens", "'filler288' = 288"))


def test_a21_tokenizer_without_pad_and_eos_is_noted_and_left_alone(folder):
    edit_json(folder / "tokenizer_config.json", eos_token=None, pad_token=None)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    found = preflight(Source(folder, "tiny"))
    assert found.tokenizer.eos_token is None and found.tokenizer.pad_token is None
    assert any("padding token" in warning for warning in found.warnings)


@pytest.mark.parametrize("names", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_missing_tokenizer_is_refused(folder, names):
    for name in names:
        (folder / name).unlink()
    refused(folder, "model.no-tokenizer", "tokenizer.json")


def test_broken_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "model.bad-tokenizer")


def test_tokenizer_written_by_transformers_5_is_read_by_both(folder):
    edit_json(folder / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    assert preflight(Source(folder, "tiny")).tokenizer.encode("the fox")


def test_a23_invalid_generation_config_is_repaired_in_a_copy(folder, tmp_path):
    edit_json(folder / "generation_config.json", do_sample=False, temperature=0.6, top_p=0.9, max_new_tokens=7)
    before = (folder / "generation_config.json").read_bytes()
    found = preflight(Source(folder, "tiny"))
    found.generation_config.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved.get("temperature") in (None, 1.0) and saved["max_new_tokens"] == 7 and saved["eos_token_id"] == 1
    assert any("temperature=0.6" in warning and "top_p=0.9" in warning for warning in found.warnings)
    assert (folder / "generation_config.json").read_bytes() == before


def test_a23_valid_generation_config_is_kept(folder):
    edit_json(folder / "generation_config.json", do_sample=True, temperature=0.6)
    found = preflight(Source(folder, "tiny"))
    assert found.generation_config.temperature == 0.6 and found.warnings == ()


def test_a24_two_checkpoints_in_one_folder_are_refused(folder, pristine_shards):
    for file in pristine_shards.glob("model*"):
        if file.name != "model.safetensors":
            shutil.copy(file, folder)
    refused(folder, "model.ambiguous", "model.safetensors.index.json")


# B: security


@pytest.mark.parametrize("entry", ["../outside.safetensors", "{absolute}/outside.safetensors", "sub/in.safetensors"])
def test_b1_weight_map_that_leaves_the_folder_is_refused(shards, entry):
    entry = entry.format(absolute=shards.parent)
    shutil.copy(next(shards.glob("model-*.safetensors")), shards.parent / "outside.safetensors")
    index = shards / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, Q: entry})
    refused(shards, "model.outside-folder", entry)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_b1_links_out_of_the_folder_are_refused(folder, name):
    outside = folder.parent / f"outside-{name}"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    refused(folder, "model.outside-folder", name)


def test_b1_links_of_the_hub_cache_are_followed(pristine, tmp_path):
    repo = tmp_path / "models--org--tiny"
    snapshot = repo / "snapshots" / ("0" * 40)
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(pristine.iterdir()):
        shutil.copy(file, repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert preflight(Source(snapshot, "org/tiny", revision="0" * 40)).warnings == ()


EVIL = "import pathlib\npathlib.Path({canary!r}).write_text('ran')\n"


@pytest.mark.parametrize("native", [True, False])
def test_b2_python_files_of_the_model_never_run_without_permission(folder, native):
    canary = folder.parent / "canary"
    (folder / "evil.py").write_text(EVIL.format(canary=str(canary)))
    code = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"}
    edit_json(folder / "config.json", auto_map=code, model_type="llama" if native else "evil")
    if native:
        assert any("ignored" in warning for warning in preflight(Source(folder, "tiny")).warnings)
    else:
        refused(folder, "model.remote-code", "evil.py sha256", "evil.EvilForCausalLM", "trust_remote_code: true")
    assert not canary.exists()


def test_b3_pickle_is_never_opened(folder):
    canary = folder.parent / "canary"
    (folder / "model.safetensors").unlink()
    payload = f"cpathlib\nPath\n(S{str(canary)!r}\ntR(dS'touch'\n.".encode()
    (folder / "pytorch_model.bin").write_bytes(payload)
    refused(folder, "pytorch_model.bin")
    assert not canary.exists()


@pytest.mark.parametrize(
    "key", ["_attn_implementation_internal", "_attn_implementation", "attn_implementation", "kernel_config"]
)
def test_b4_keys_that_choose_code_are_dropped_and_named(folder, key):
    edit_json(folder / "config.json", **{key: "org/repo", "text": {"_experts_implementation_internal": "org/repo"}})
    found = preflight(Source(folder, "tiny"))
    assert "org/repo" not in json.dumps({k: str(v) for k, v in vars(found.config).items()})
    assert any(key in warning for warning in found.warnings)
    assert any("text._experts_implementation_internal" in warning for warning in found.warnings)


def test_only_keys_that_can_choose_code_raise_that_alarm(folder):
    edit_json(folder / "config.json", _model_name_or_path="org/repo", _anything_else="org/repo")
    found = preflight(Source(folder, "tiny"))
    (warning,) = found.warnings
    assert "_anything_else was ignored" in warning and "code" not in warning
    assert not hasattr(found.config, "_anything_else")


def test_the_sliding_window_pattern_of_gemma_3_is_kept_without_an_alarm(folder):
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=2, _sliding_window_pattern=2).to_dict()
    (folder / "config.json").write_text(json.dumps({**config, "_sliding_window_pattern": 2}))
    _, notes = read_config(folder)
    assert notes == []


def test_b4_an_underscored_option_of_the_architecture_itself_is_kept(tmp_path, pristine):
    folder = _write(tmp_path / "model", pristine, OPT)
    edit_json(folder / "config.json", _remove_final_layer_norm=True)
    found = preflight(Source(folder, "opt"))
    assert found.config._remove_final_layer_norm is True
    assert not any("_remove_final_layer_norm" in warning for warning in found.warnings)


ROTARY = {"rope_theta": 500.0, "rope_type": "default"}


@pytest.mark.parametrize(
    ("model_type", "old", "rotary", "width"),
    [
        ("llama", ("rope_theta", "rope_scaling"), ROTARY, 8),
        ("gpt_neox", ("rotary_emb_base", "rotary_pct", "rope_scaling"), {**ROTARY, "partial_rotary_factor": 0.5}, 4),
    ],
)
def test_rotary_settings_written_by_transformers_5_reach_the_model(folder, model_type, old, rotary, width):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
    data = AutoConfig.for_model(model_type, **sizes, vocab_size=288).to_dict()
    data = {key: value for key, value in data.items() if key not in (*old, "rope_theta", "partial_rotary_factor")}
    (folder / "config.json").write_text(json.dumps({**data, "rope_parameters": rotary}))
    model = AutoModelForCausalLM.from_config(read_config(folder)[0])
    expected = 500.0 ** -(torch.arange(0, width, 2) / width)
    torch.testing.assert_close(model.base_model.rotary_emb.inv_freq, expected)


# Names that transformers converts while loading


def _write(folder: Path, pristine: Path, config: object) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder.mkdir(exist_ok=True)
        shutil.copy(pristine / name, folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=288, n_positions=32)
OPT = OPTConfig(
    hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=288, word_embed_proj_dim=32
)
MIXTRAL = MixtralConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=288,
    num_local_experts=4,
)


@pytest.mark.parametrize(("config", "prefix"), [(GPT2, "transformer."), (OPT, "model.")])
def test_checkpoints_of_old_without_a_prefix_pass(tmp_path, pristine, config, prefix):
    folder = _write(tmp_path / "model", pristine, config)
    found = headers(folder)
    file = folder / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(file).items()}
    assert set(tensors) != set(found)
    save_file(tensors, file, metadata={"format": "pt"})
    assert preflight(Source(folder, "old")).contents.tied


@pytest.mark.parametrize(
    ("change", "code"),
    [(lambda _: None, "model."), (lambda _: torch.zeros(7, 5), "model.wrong-shape")],
    ids=["missing", "wrong shape"],
)
def test_experts_pass_when_whole_and_are_named_when_not(tmp_path, pristine, change: Callable, code):
    folder = _write(tmp_path / "model", pristine, MIXTRAL)
    assert preflight(Source(folder, "moe")).warnings == ()
    expert = next(name for name in headers(folder) if ".experts.2." in name)
    edit_tensors(folder / "model.safetensors", **{expert: change(None)})
    refused(folder, code, expert)


def test_tensors_without_a_place_are_noted(folder):
    edit_tensors(folder / "model.safetensors", **{"model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)})
    assert any("model.layers.7" in warning for warning in preflight(Source(folder, "tiny")).warnings)


def test_notes_reach_the_progress_display(folder):
    class Notes(Silent):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def note(self, text: str) -> None:
            self.lines.append(text)

    edit_json(folder / "config.json", _surprise=1)
    shown = Notes()
    found = preflight(Source(folder, "tiny"), progress=shown)
    assert tuple(shown.lines) == found.warnings != ()
