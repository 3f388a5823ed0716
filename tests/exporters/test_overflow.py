"""What a loader would compute from codes and scales is finite in the stored dtype, or nothing is saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmcompress import CompressError, compress, plan
from llmcompress.recipe import Recipe, parse_recipe
from tests.tiny_folder import edit_json, edit_tensors, write_tiny_llama

SITE = "model.layers.1.self_attn.v_proj"


def _recipe(algorithm: str, save: str) -> Recipe:
    return parse_recipe(
        f"calibration: {{samples: 4, tokens: 32}}\npasses: [{{{algorithm}: {{scheme: int4_g32}}}}]\n"
        f"evaluate: {{perplexity: []}}\nsave: {{{save}}}",
        "test",
    )


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """One weight is 1e5: bfloat16 holds it, float16 does not, and float16 holds its scale."""
    folder = write_tiny_llama(tmp_path / "model", intermediate_size=64)
    weight = torch.full((16, 32), 0.01, dtype=torch.bfloat16)
    weight[3, 5] = 1e5
    edit_tensors(folder / "model.safetensors", **{f"{SITE}.weight".replace(".", "__"): weight})
    return folder


@pytest.mark.parametrize("form", ["compressed-tensors", "plain", "llmcompress"])
@pytest.mark.parametrize("algorithm", ["gptq", "rtn"])
def test_codes_times_scales_that_overflow_the_stored_dtype_are_not_saved(
    algorithm: str, form: str, huge: Path, tmp_path: Path
) -> None:
    with pytest.raises(CompressError) as caught:
        compress(str(huge), _recipe(algorithm, f"dtype: float16, format: {form}"), tmp_path / "out")
    assert caught.value.code == "save.overflow" and SITE in caught.value.where and "float16" in caught.value.what
    assert "2 finished blocks" in caught.value.saved and not (tmp_path / "out").exists()


def test_the_same_model_is_saved_in_a_dtype_that_holds_it(huge: Path, tmp_path: Path) -> None:
    compress(str(huge), _recipe("gptq", "dtype: bfloat16"), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_of_the_config_that_is_not_finite_is_refused_before_any_work(value: float, tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model", intermediate_size=64)
    edit_json(folder / "config.json", rms_norm_eps=value)
    for refusing in (
        lambda: plan(str(folder), _recipe("rtn", "dtype: checkpoint")),
        lambda: compress(str(folder), _recipe("rtn", "dtype: checkpoint"), tmp_path / "out"),
    ):
        with pytest.raises(CompressError) as caught:
            refusing()
        assert caught.value.code == "model.bad-config" and "rms_norm_eps" in caught.value.where
    assert not list(tmp_path.glob("out*"))


def test_an_open_bound_may_be_infinite(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model", intermediate_size=64)
    edit_json(folder / "config.json", time_step_limit=[0.0, float("inf")])
    assert json.loads((folder / "config.json").read_text())["time_step_limit"][1] == float("inf")
    assert plan(str(folder), _recipe("rtn", "dtype: checkpoint")).sites
