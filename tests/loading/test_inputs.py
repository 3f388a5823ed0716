"""Bad input is refused with a code and a place, never met as a bug: damaged JSON, impossible sizes, missing shards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz_inputs import CHEAPEST, PLAIN_MODEL, damaged, mutations, run, write_inputs

from llmcompress.calibration.devices import usable_device
from llmcompress.cli.failures import report_failure
from llmcompress.errors import CompressError, ExitCode
from llmcompress.loading.config import read_config
from llmcompress.loading.preflight import preflight
from llmcompress.loading.source import Source, find_source
from llmcompress.pipeline import compress, inspect
from llmcompress.recipe import parse_recipe
from llmcompress.storage.folder import check_output, staging_folder
from llmcompress.storage.json_file import read_json
from tests.tiny_folder import edit_json, write_tiny_llama


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("inputs") / "model", shard="30KB")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "model")


def refused(call: Callable[[], object]) -> CompressError:
    with pytest.raises(CompressError) as caught:
        call()
    return caught.value


def test_100_damaged_files_end_well_or_in_a_refusal(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write_inputs(tmp_path)
    commands = [("compress", "dense", "--recipe", "cheapest.yaml", "--dry-run")]
    ended = {
        (each.file, each.what): damaged(tmp_path, each, commands)[0]
        for each in mutations(tmp_path, count=100, seed=13, files=PLAIN_MODEL)
    }
    assert {case: how for case, how in ended.items() if how.exit_code == ExitCode.BUG} == {}
    assert len(set(ended.values())) > 5


@pytest.mark.parametrize(
    ("content", "what", "place"),
    [
        (b'{"a": 1,\n "b": ]}', "found ']}'", "line 2, column 7"),
        (b'{"a": 1', "found the end", "line 1, column 8"),
        (b"", "found the end", "line 1, column 1"),
        (b'{"a":\n\xff}', "0xff", "line 2, column 1"),
        (b"[1]", "a list", "line 1"),
        (b"3", "a number", "line 1"),
        (b'{"a":' * 100_000, "nested", ""),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits", ""),
    ],
)
def test_json_that_is_no_object_is_refused_with_line_column_and_what_was_found(tmp_path, content, what, place):
    (tmp_path / "x.json").write_bytes(content)
    error = refused(lambda: read_json(tmp_path / "x.json"))
    assert error.code == "model.bad-json" and what in error.what and "x.json" in error.what
    assert error.where.startswith(str(tmp_path / "x.json")) and place in error.where


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "", 7, None])
def test_an_index_that_names_no_possible_file_is_refused(folder, name):
    edit_json(folder / "model.safetensors.index.json", weight_map={"lm_head.weight": name})
    assert refused(lambda: preflight(Source(folder, "m"))).code == "model.bad-index"


def test_a_tokenizer_with_a_setting_of_a_wrong_type_is_refused_when_it_is_read(folder):
    edit_json(folder / "tokenizer_config.json", model_max_length="1000")
    assert refused(lambda: preflight(Source(folder, "m"))).code == "model.bad-tokenizer"


def test_a_file_that_cannot_be_opened_is_refused(tmp_path):
    assert "cannot be read" in refused(lambda: read_json(tmp_path)).what


@pytest.mark.parametrize("content", [b"{}", b"[]", b"{", b'{"weight_map": {"\xff": "a"}}', None])
def test_compress_refuses_a_bad_index_and_a_missing_shard_before_it_counts_bytes(folder, tmp_path, content):
    if content is None:
        next(folder.glob("model-00002*")).unlink()
    else:
        (folder / "model.safetensors.index.json").write_bytes(content)
    error = refused(lambda: compress(str(folder), parse_recipe(CHEAPEST, "r.yaml"), tmp_path / "out", device="cpu"))
    assert error.code in ("model.bad-index", "model.bad-json", "model.missing-file")
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_hidden_layers": 10_000_000, "layer_types": None}, "num_hidden_layers = 10000000"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"num_attention_heads": 7, "head_dim": None}, "heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"initializer_range": "x"}, "initializer_range"),
        ({"intermediate_size": 48_000_000}, "intermediate_size = 48000000"),
        ({"intermediate_size": 4_800_000}, "over 1024 times hidden_size"),
        ({"head_dim": 60_000}, "head_dim = 240000 is over"),
        ({"head_dim": 3}, "head_dim = 3"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"architectures": 5}, "architectures"),
        ({"output_hidden_states": ["a", None]}, "output_hidden_states"),
        ({"text_config": {"a": 1}}, "text_config"),
    ],
)
@pytest.mark.parametrize("ask", [lambda folder: preflight(Source(folder, "m")), lambda folder: inspect(str(folder))])
def test_sizes_and_kinds_that_no_model_has_are_refused_before_anything_is_built(
    folder, monkeypatch, changes, named, ask
):
    def build(*_: object, **__: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", build)
    edit_json(folder / "config.json", **changes)
    error = refused(lambda: ask(folder))
    assert error.code == "model.bad-config" and named in str(error) and "config.json" in error.where


@pytest.mark.parametrize("values", [{"pad_token_id": 999_999}, {"hidden_act": "no-such"}])
def test_what_only_building_the_model_shows_is_refused_by_inspect(folder, values):
    edit_json(folder / "config.json", **values)
    assert refused(lambda: inspect(str(folder))).exit_code is ExitCode.REFUSED


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        MemoryError(),
    ],
)
def test_memory_that_ran_out_on_the_cpu_is_exit_4(capsys, failure):
    assert report_failure(failure, as_json=False) == ExitCode.RESOURCES
    assert "out of memory" in capsys.readouterr().err


def test_memory_that_runs_out_while_loading_is_not_called_a_fault_of_the_model(folder, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", fail)
    with pytest.raises(RuntimeError, match="allocate memory"):
        preflight(Source(folder, "m"))


def test_a_folder_of_an_unknown_user_is_a_folder_that_is_not_there():
    error = refused(lambda: find_source("~nosuchuser/x"))
    assert error.code == "model.no-folder" and error.exit_code is ExitCode.USAGE


def test_a_device_without_values_is_refused():
    assert refused(lambda: usable_device("meta")).code == "device.unusable"
    assert usable_device("cpu") == torch.device("cpu")


def test_a_name_that_its_temporary_folders_cannot_take_is_refused_before_any_work(tmp_path):
    error = refused(lambda: check_output(tmp_path / ("x" * 250), overwrite=False))
    assert error.code == "output.name" and error.exit_code is ExitCode.USAGE
    longest = tmp_path / ("x" * 241)
    check_output(longest, overwrite=False)
    with staging_folder(longest):
        pass


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(folder, monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "own.py").write_text(CODE)
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit_json(folder / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=code)
    return folder


def test_a_local_folder_runs_its_code_when_trusted_and_the_files_are_named_with_their_hashes(with_code):
    order = parse_recipe(f"model: {with_code}\ntrust_remote_code: true\npasses: [rtn]", "r")
    assert refused(lambda: preflight(find_source(str(with_code)))).code == "model.remote-code"
    source = find_source(str(order.model), trust_remote_code=order.trust_remote_code)
    found = preflight(source, trust_remote_code=order.trust_remote_code)
    assert type(found.config).__name__ == "OwnConfig"
    assert any("own.py sha256" in warning for warning in found.warnings)


def test_code_of_another_repository_is_refused_even_when_trusted(with_code):
    edit_json(with_code / "config.json", auto_map={"AutoConfig": "org/name--own.OwnConfig"})
    error = refused(lambda: read_config(with_code, trust_remote_code=True))
    assert error.code == "model.code-elsewhere" and "org/name--own.OwnConfig" in error.what


@pytest.mark.parametrize("code", [ExitCode.TERMINATED, ExitCode.INTERRUPTED])
def test_a_signal_ends_the_fuzzing_and_not_one_of_its_commands(
    code: ExitCode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(words: list[str]) -> None:
        raise SystemExit(int(code))

    monkeypatch.setattr("fuzz_inputs.llmcompress", ended)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ["inspect", "dense"])
