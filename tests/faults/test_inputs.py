"""Faults of inputs that no other test injects: what is refused, where, with which words, and what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress import CompressError, PerplexityTask, compress, evaluate, load, plan
from llmcompress.recipe import parse_recipe
from llmcompress.runners.base import RUNNERS
from tests.faults.injected import onnx_data_outside
from tests.tiny_folder import edit_json, edit_tensors, write_tiny_llama

ROUNDED = "passes: [rtn: {scheme: int4_g16, sites: '*.q_proj'}]\nevaluate: {}\n"


@pytest.mark.parametrize("form", ["auto", "plain"])
def test_a14_weights_beyond_float16_are_refused_by_name(form: str, tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    weight = torch.full((16, 32), 0.01, dtype=torch.bfloat16)
    weight[3, 5] = 1e5
    edit_tensors(folder / "model.safetensors", model__layers__1__self_attn__v_proj__weight=weight)
    with pytest.raises(CompressError) as refused:
        compress(str(folder), parse_recipe(f"{ROUNDED}save: {{dtype: float16, format: {form}}}", "r"), tmp_path / "out")
    assert "layers.1.self_attn.v_proj" in refused.value.where and "float16" in refused.value.what
    assert not (tmp_path / "out").exists()


def test_b7_a_recipe_cannot_say_where_files_are_written() -> None:
    with pytest.raises(CompressError) as refused:
        parse_recipe(f"{ROUNDED}output: ../../etc\n", "r.yaml")
    assert refused.value.code == "recipe.unknown-key" and refused.value.exit_code == 2
    assert "output" in refused.value.what and "r.yaml" in refused.value.where and "3" in refused.value.where


def test_c10_a_gpu_that_is_not_there_is_refused_before_any_work(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    with pytest.raises(CompressError) as refused:
        compress(str(folder), parse_recipe(ROUNDED, "r"), tmp_path / "out", device="cuda:7")
    assert "cuda:7" in refused.value.what and "cpu" in refused.value.fix
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"a": {"dtype": "BF16", "shape": [Infinity], "data_offsets": [0, 2]}}',
    ],
    ids=["nested", "infinite"],
)
def test_a_header_that_no_writer_writes_is_a_damaged_file(header: bytes, tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CompressError) as refused:
        plan(str(folder), parse_recipe(ROUNDED, "r"))
    assert refused.value.code == "model.damaged-file" and "model.safetensors" in refused.value.where


def test_a_config_that_asks_for_tuples_is_read_all_the_same(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    edit_json(folder / "config.json", return_dict=False)
    found = evaluate(str(folder), PerplexityTask(source="builtin:evaluation", window=32, max_windows=1))
    assert found.perplexities[0].perplexity > 1
    edit_json(folder / "config.json", return_dict={})
    with pytest.raises(CompressError, match="return_dict"):
        plan(str(folder), parse_recipe(ROUNDED, "r"))


def test_codes_whose_description_is_none_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    compress(str(folder), parse_recipe(ROUNDED, "r"), tmp_path / "out")
    edit_json(
        tmp_path / "out" / "config.json", quantization_config={"quant_method": "compressed-tensors", "config_groups": 7}
    )
    with pytest.raises(CompressError) as refused:
        load(tmp_path / "out")
    assert refused.value.exit_code == 3


def test_b12_onnx_data_outside_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "dense")
    onnx_data_outside(tmp_path)
    with pytest.raises(CompressError, match="escapes model directory") as refused:
        RUNNERS["onnxruntime"].open(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    assert refused.value.code == "model.unloadable"


@pytest.mark.parametrize("given", ["calibration", "model"])
def test_a_name_that_no_file_system_takes_is_not_there(given: str, tmp_path: Path) -> None:
    folder, name = write_tiny_llama(tmp_path / "model"), f"{'a' * 300}.txt"
    recipe = parse_recipe(
        "calibration: {samples: 2, tokens: 16}\npasses: [gptq: {scheme: int4_g16}]\nevaluate: {}", "r"
    )
    recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"source": name})})
    with pytest.raises(CompressError) as refused:
        plan(name if given == "model" else str(folder), recipe)
    assert refused.value.exit_code in (2, 3)


@pytest.mark.parametrize("tasks", [{"perplexity": ["a.txt"]}, [{"perplexity": ["a.txt"]}], [3]], ids=str)
def test_what_is_no_text_and_no_settings_is_not_evaluated(tasks: Any) -> None:
    with pytest.raises(CompressError, match="no text and no settings") as refused:
        evaluate("builtin:books-llama", tasks)
    assert refused.value.exit_code == 2
