"""`inspect` of what we saved: every site with what it is, from config, manifest, report and headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmcompress.errors import CompressError
from llmcompress.evaluation.inspection import inspect_folder
from llmcompress.loading.tensors import Tensors
from llmcompress.pipeline import compress
from llmcompress.recipe import parse_recipe
from tests.tiny_folder import edit_json, write_tiny_llama


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("inspection") / "model")


def saved(dense: Path, output: Path, recipe: str) -> Path:
    compress(str(dense), parse_recipe(f"{recipe}\nevaluate: {{}}", "r.yaml"), output, device="cpu")
    return output


def by_kind(found: dict) -> dict[str, dict]:
    return {row["site"].rpartition(".")[2]: row for row in found["compressed"]}


@pytest.mark.parametrize(("form", "format"), [("auto", "compressed-tensors"), ("llmcompress", "llmcompress")])
def test_codes_are_told_with_scheme_bits_and_size(dense, tmp_path, monkeypatch, form, format):
    recipe = f"passes: [rtn: {{scheme: int4_g16, exclude: '*.o_proj'}}]\nsave: {{format: {form}}}"
    folder = saved(dense, tmp_path / "out", recipe)
    read: list[str] = []
    plain = Tensors.__call__
    monkeypatch.setattr(Tensors, "__call__", lambda self, header: read.append(header.name) or plain(self, header))
    found = inspect_folder(folder)
    assert not [name for name in read if not name.endswith("weight_shape")], "weights were read"
    assert (found["format"], found["sites"], found["made_from"]) == (format, 12, str(dense))
    rows = by_kind(found)
    assert set(rows) == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    up = rows["up_proj"]
    assert up["site"] == "model.layers.{0-1}.mlp.up_proj" and up["by"] == "rtn" and up["scheme"] == "int4_g16"
    assert (up["outputs"], up["inputs"], up["bits"]) == (48, 32, 5.0)  # 4 + 16 of a scale / 16


def test_without_our_report_the_files_speak_alone(dense, tmp_path):
    folder = saved(dense, tmp_path / "out", "passes: [rtn: {scheme: int4_g16}]")
    (folder / "llmcompress_report.json").unlink()
    found = inspect_folder(folder)
    assert "made_from" not in found and by_kind(found)["up_proj"]["code_bits"] == 4


def test_factors_are_told_with_their_rank(dense, tmp_path):
    folder = saved(dense, tmp_path / "out", "passes: [svd: {rank: 3, sites: '*.mlp.*', whitening: none}]")
    assert {row["rank"] for row in inspect_folder(folder)["compressed"]} == {3}


def test_a_plain_folder_shows_its_map_and_what_was_done(dense, tmp_path):
    folder = saved(dense, tmp_path / "out", "passes: [magnitude: {sparsity: 0.5}]")
    found = inspect_folder(folder)
    assert found["family"] == "llama" and found["kinds"]
    assert by_kind(found)["up_proj"]["sparsity"] == 0.5


def test_an_adapter_or_a_foreign_format_is_refused_in_words(dense, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x/y"}))
    with pytest.raises(CompressError) as adapter:
        inspect_folder(tmp_path / "adapter")
    assert adapter.value.code == "model.adapter"
    foreign = write_tiny_llama(tmp_path / "foreign")
    for config in ({"quant_method": "awq", "bits": 4}, "text"):
        edit_json(foreign / "config.json", quantization_config=config)
        with pytest.raises(CompressError) as refused:
            inspect_folder(foreign)
        assert refused.value.code == "footprint.format"
    edit_json(foreign / "config.json", quantization_config={"quant_method": "compressed-tensors"})
    with pytest.raises(CompressError) as damaged:
        inspect_folder(foreign)
    assert damaged.value.code == "footprint.damaged"
