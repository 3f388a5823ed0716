"""`verify` finds every fault that can be planted in a saved folder, and none in one that is as it was written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress import compress, verify
from llmcompress.cli.main import main
from llmcompress.records.verification import Check, Verification
from llmcompress.storage.disk import sha256
from llmcompress.storage.ownership import FileDigest, mark_output, written_files
from llmcompress.verification.reloading import in_fresh_process
from llmcompress.verification.verifying import verified
from tests.tiny_folder import write_tiny_llama
from tests.warm_python import WarmPython

CALIBRATION = {"source": "builtin:calibration", "samples": 4, "tokens": 32}
RECIPES = {
    "compressed-tensors": {"passes": [{"gptq": {"scheme": "int4_g16"}}]},
    "plain": {"passes": [{"wanda": {"sparsity": 0.5}}]},
    "llmcompress": {"passes": [{"svd": {"fraction": 0.5}}, {"rtn": {"scheme": "int3_channel"}}]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("verify")
    tiny = write_tiny_llama(root / "tiny")
    for name, recipe in RECIPES.items():
        compress(str(tiny), {**recipe, "calibration": CALIBRATION, "evaluate": {}}, root / name)
    return {name: root / name for name in RECIPES}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["compressed-tensors"], tmp_path / "out"))


def results(found: Verification) -> dict[str, Check]:
    return {each.name: each for each in found.checks}


def rewrite(folder: Path, name: str, text: str) -> None:
    """A change that its digest goes along with: what is wrong has to be seen in the file itself."""
    (folder / name).write_text(text)
    redigest(folder, name)


def redigest(folder: Path, name: str) -> None:
    digest = FileDigest((folder / name).stat().st_size, sha256(folder / name))
    mark_output(folder, {**written_files(folder), name: digest})


@pytest.mark.parametrize("name", RECIPES)
def test_a_folder_as_it_was_written_holds(folders: dict[str, Path], name: str) -> None:
    found = results(verify(folders[name]))
    assert [each for each in found.values() if each.result == "failed"] == []
    assert {each for each, check in found.items() if check.result == "ok"} == {
        "files", "tensors", "finite", "recipe", "origin",
    }  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_fresh_process_computes_the_same_logits(
    folders: dict[str, Path], name: str, stock_python: WarmPython, our_python: WarmPython
) -> None:
    def fresh(program: str, arguments: Sequence[str]) -> str:
        python = our_python if name == "llmcompress" else stock_python
        done = python.run(program, *arguments, imports_us=name == "llmcompress")
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    check = results(verified(folders[name], name="x", deep=True, fresh=fresh))["reload"]
    assert check.result == "ok" and "bit for bit" in check.found, check.found


def test_a_fresh_process_that_computes_something_else_is_told(folder: Path) -> None:
    def fresh(_: str, arguments: Sequence[str]) -> str:
        ids, logits = torch.arange(48)[None], torch.zeros(1, 48, 288)
        save_file({"ids": ids, "logits": logits}, arguments[1])
        return json.dumps({"dtype": "float32", "missing_keys": [], "unexpected_keys": [], "mismatched_keys": []})

    assert results(verified(folder, name="x", deep=True, fresh=fresh))["reload"].result == "failed"


def one_bit(folder: Path) -> None:
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-3] ^= 4
    (folder / "model.safetensors").write_bytes(weights)


def not_a_number(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    redigest(folder, "model.safetensors")


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_packed"], tensors["model.layers.1.mlp.up_proj.weight_scale"]
    del tensors["model.layers.1.mlp.up_proj.weight_shape"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    redigest(folder, "model.safetensors")


def fewer_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    rewrite(folder, "config.json", json.dumps({**config, "num_hidden_layers": 1}))


def another_recipe(folder: Path) -> None:
    text = (folder / "llmcompress_recipe.yaml").read_text()
    rewrite(folder, "llmcompress_recipe.yaml", text.replace("int4_g16", "int4_g8"))


FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a flipped bit": (one_bit, "files", "model.safetensors"),
    "a missing file": (lambda folder: (folder / "tokenizer.json").unlink(), "files", "tokenizer.json"),
    "a foreign shard": (lambda folder: shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors"),
                        "files", "model-2.safetensors"),
    "a truncated file": (lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-9]), "tensors", "model.safetensors"),
    "NaN": (not_a_number, "finite", "model.norm.weight"),
    "a missing linear": (without_a_tensor, "tensors", "layers.1.mlp.up_proj"),
    "a config of fewer layers": (fewer_layers, "tensors", "layers.1"),
    "another recipe": (another_recipe, "recipe", "llmcompress_recipe.yaml"),
    "a damaged config": (lambda folder: rewrite(folder, "config.json", "{"), "tensors", "config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_every_planted_fault_is_found_where_it_is(folder: Path, name: str) -> None:
    plant, check, where = FAULTS[name]
    plant(folder)
    found = results(verify(folder))[check]
    assert found.result == "failed" and where in f"{found.found} {found.where}", found


def test_tensors_of_our_own_format_are_those_of_the_manifest(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["llmcompress"], tmp_path / "out"))
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "layers.1" in name)
    tensors["stray.weight"] = tensors.pop(lost)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = results(verify(folder))["tensors"]
    assert found.result == "failed" and set(found.where) == {lost, "stray.weight"}


def test_a_card_may_be_edited_and_a_file_of_the_users_may_lie_beside(folder: Path) -> None:
    (folder / "README.md").write_text("# Mine")
    (folder / "notes.txt").write_text("x")
    assert not verify(folder).failed


def test_a_folder_of_another_program_is_checked_as_far_as_that_goes(tmp_path: Path) -> None:
    found = results(verify(write_tiny_llama(tmp_path / "tiny")))
    assert found["files"].result == found["recipe"].result == "skipped"
    assert found["tensors"].result == found["finite"].result == "ok"


def test_the_command_ends_with_exit_code_6(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as ended:
            main(["verify", str(folder), *words])
        return ended.value.code, capsys.readouterr().out

    code, out = run("--json")
    assert code == 0 and json.loads(out)["ok"] is True
    one_bit(folder)
    code, out = run("--json")
    assert code == 6 and json.loads(out)["checks"][0]["where"] == ["model.safetensors"]
    code, out = run()
    assert code == 6 and "1 changed of" in out


def test_a_library_that_is_missing_is_no_fault_of_the_folder(folder: Path) -> None:
    def fresh(_: str, __: Sequence[str]) -> str:
        return in_fresh_process("raise ImportError('Loading a GPTQ model requires gptqmodel')", [])

    found = results(verified(folder, name="x", deep=True, fresh=fresh))["reload"]
    assert found.result == "skipped" and "requires gptqmodel" in found.found


def test_a_fresh_process_has_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "c" * 34)
    assert in_fresh_process("import os; print(os.environ.get('HF_TOKEN'))", []).strip() == "None"
