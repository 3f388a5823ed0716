"""What makes two runs the same run: the seed of the recipe, and the weights that it started from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmcompress import CompressError, compress
from llmcompress.model.site import LinearSite
from llmcompress.recipe import Recipe, parse_recipe
from tests.tiny_folder import edit_tensors, write_tiny_llama

SETTINGS = "calibration: {samples: 3, tokens: 32}\nevaluate: {perplexity: []}\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def recipe(passes: str, seed: int = 0) -> Recipe:
    return parse_recipe(f"{SETTINGS}seed: {seed}\npasses: [{passes}]", "test")


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "passes",
    ["gptq: {scheme: int4_g16}", "rotation: {}"],
    ids=["calibration windows", "random rotation"],
)
def test_the_seed_of_the_recipe_decides_whatever_is_drawn(passes: str, tiny: Path, tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate((3, 3, 4)):
        compress(str(tiny), recipe(f"{{{passes}}}", seed), tmp_path / str(number))
        found.append(weights_hash(tmp_path / str(number)))
    assert found[0] == found[1] != found[2]


def test_a_killed_run_is_not_resumed_on_other_weights_of_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, chosen = write_tiny_llama(tmp_path / "model"), recipe("{rtn: {scheme: int4_g16}}")
    replace = LinearSite.replace

    def failing(site: LinearSite, module: Any) -> None:
        if ".1." in site.name:
            raise KeyboardInterrupt
        replace(site, module)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LinearSite, "replace", failing)
        compress(str(model), chosen, tmp_path / "out")
    norm = "model.layers.0.input_layernorm.weight"
    before = load_file(model / "model.safetensors")[norm]
    edit_tensors(model / "model.safetensors", **{norm.replace(".", "__"): before * 2})
    with pytest.raises(CompressError) as refused:
        compress(str(model), chosen, tmp_path / "out")
    assert refused.value.code == "run.other" and "weights: " in refused.value.where
    edit_tensors(model / "model.safetensors", **{norm.replace(".", "__"): before})
    compress(str(model), chosen, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[norm], before)
