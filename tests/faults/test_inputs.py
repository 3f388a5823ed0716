"""Faults of inputs that no other test injects: what is refused, where, with which words, and what is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmcompress import CompressError, compress
from llmcompress.recipe import parse_recipe
from tests.tiny_folder import edit_tensors, write_tiny_llama

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
