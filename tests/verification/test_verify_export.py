"""An export is verified as its target has it, and `--deep` runs it again in the target's own runtime."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from llmcompress import compress
from llmcompress.compressed_model import CompressedModel
from llmcompress.exporters.base import EXPORTERS
from llmcompress.exporters.onnx_file import DATA
from llmcompress.model_export import export
from llmcompress.records.export_report import EXPORT_REPORT
from llmcompress.verification.verifying import verified
from tests.tiny_folder import write_tiny_llama
from tests.warm_python import WarmPython

FOR_TRANSFORMERS = ("plain", "archive", "compressed-tensors", "llmcompress")
OF_A_PASS = {
    "bitsandbytes": [{"bnb_nf4": {}}],
    "peft": [
        {"rtn": {"scheme": "int4_g16"}},
        {"recover": {"rank": 2, "training": {"steps": 1, "batch": 2, "learning_rate": 0.001}}},
    ],
}
BY_THEMSELVES = ("gguf", "gptq", "tensorrt_llm", "onnx_genai")
ELSEWHERE = ("onnx", "onnx_static_int8", "openvino", "aot_inductor")
"""Optimum or a compiler makes them: their own tests in tests/exporters verify what they export."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> CompressedModel:
    root = tmp_path_factory.mktemp("exports")
    tiny = write_tiny_llama(root / "tiny", hidden_size=64, intermediate_size=64)
    return compress(str(tiny), {"passes": [{"rtn": {"scheme": "int4_g32"}}], "evaluate": {}}, root / "out")


def test_gguf_is_run_again_by_llama_cpp_and_another_perplexity_is_told(
    made: CompressedModel, tmp_path: Path, our_python: WarmPython
) -> None:
    folder = tmp_path / "gguf"
    export(made, "gguf", folder)

    def fresh(program: str, arguments: Sequence[str]) -> str:
        done = our_python.run(program, *arguments, imports_us=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    found = {each.name: each for each in verified(folder, name="x", deep=True, fresh=fresh).checks}
    assert [each.name for each in found.values() if each.result == "failed"] == []
    assert found["export"].result == found["files"].result == "ok" and found["tensors"].result == "skipped"
    assert found["reload"].result == "ok" and "llama.cpp" in found["reload"].found

    report = json.loads((folder / EXPORT_REPORT).read_text())
    report["runtime"]["perplexity_runtime"] *= 1.01
    (folder / EXPORT_REPORT).write_text(json.dumps(report))
    again = {each.name: each.result for each in verified(folder, name="x", deep=True, fresh=fresh).checks}
    assert again["reload"] == again["files"] == "failed"


@pytest.mark.parametrize("target", FOR_TRANSFORMERS)
def test_what_transformers_loads_is_compared_with_config_json(
    made: CompressedModel, tmp_path: Path, target: str
) -> None:
    made.export(target, tmp_path / target)
    found = {each.name: each for each in verified(tmp_path / target, name="x").checks}
    assert [each for each in found.values() if each.result == "failed"] == []
    assert found["tensors"].result == found["finite"].result == found["files"].result == "ok"
    assert found["export"].result == "ok"


@pytest.mark.parametrize("target", OF_A_PASS)
def test_what_only_a_certain_pass_makes_is_verified_too(made: CompressedModel, tmp_path: Path, target: str) -> None:
    assert made.recipe.model is not None
    text = {"source": "builtin:calibration", "samples": 4, "tokens": 32}
    done = compress(made.recipe.model, {"passes": OF_A_PASS[target], "calibration": text, "evaluate": {}})
    done.export(target, tmp_path / target)
    found = {each.name: each for each in verified(tmp_path / target, name="x").checks}
    assert [each for each in found.values() if each.result == "failed"] == []
    assert found["files"].result == "ok" and found["origin"].result in ("ok", "skipped")


@pytest.mark.parametrize(("target", "held"), [("onnx_genai", DATA), ("gptq", "model.safetensors")])
def test_what_another_runtime_reads_is_verified_and_what_was_changed_in_it_is_told(
    made: CompressedModel, tmp_path: Path, target: str, held: str
) -> None:
    made.export(target, tmp_path / "out")
    checks = verified(tmp_path / "out", name="x").checks
    assert not [each for each in checks if each.result == "failed"]
    assert {"files", "export"} <= {each.name for each in checks if each.result == "ok"}
    content = bytearray((tmp_path / "out" / held).read_bytes())
    content[-1] ^= 1
    (tmp_path / "out" / held).write_bytes(content)
    failed = {each.name: each.where for each in verified(tmp_path / "out", name="x").failed}
    assert failed["files"] == (held,)


def test_every_target_is_verified_by_one_of_these_tests() -> None:
    assert {*FOR_TRANSFORMERS, *OF_A_PASS, *BY_THEMSELVES, *ELSEWHERE} == set(EXPORTERS)


def test_what_has_another_layout_is_not_taken_for_a_model_of_transformers(
    made: CompressedModel, tmp_path: Path
) -> None:
    recipe = {"passes": [{"rtn": {"scheme": "int8_channel"}}], "evaluate": {}}
    assert made.recipe.model is not None
    compress(made.recipe.model, recipe).export("tensorrt_llm", tmp_path / "trt")
    found = {each.name: each for each in verified(tmp_path / "trt", name="x", deep=True).checks}
    assert [each.name for each in found.values() if each.result == "failed"] == []
    assert found["tensors"].result == "skipped" and found["reload"].result == "skipped"
