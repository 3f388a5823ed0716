"""Exact zeros that a checkpoint brings along: a mask stays one, a level of the grid it was rounded to is a weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.calibration.context import RunContext
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import restore, round_to_codes
from llmcompress.numerics.ranges import fit
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import BlockPass
from llmcompress.progress import Silent
from tests.families import tiny_model
from tests.passes.test_laws import make, map_of, windows

FAMILY = "llama_gqa"
QUANTIZERS: dict[str, dict[str, Any]] = {
    "gptq": {"scheme": "int3_g32"},
    "learned_rounding": {"scheme": "int3_g32", "steps": 4},
    "gsq": {"scheme": "int3_g32", "steps": 4},
}


class Noting(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def applied(model: Any, *passes: BlockPass) -> tuple[Any, list[str]]:
    progress = Noting()
    model, _ = apply_passes(model, map_of(FAMILY, model), passes, RunContext(windows(), batch=4, progress=progress))
    return model, progress.notes


def site_names() -> list[str]:
    return list(map_of(FAMILY, tiny_model(FAMILY, seed=1)).site_names())


def weights(model: Any) -> dict[str, Tensor]:
    found = {site: model.get_submodule(site) for site in site_names()}
    return {
        site: (linear.dense_weight() if hasattr(linear, "dense_weight") else linear.weight).detach().clone()
        for site, linear in found.items()
    }


def rounded(model: Any) -> Any:
    """As a checkpoint that was quantized symmetrically at four bits and written out in full."""
    grid = named_scheme("int4_g32").weights
    for site in site_names():
        weight = model.get_submodule(site).weight
        fitted = fit(weight.detach(), grid, scale_dtype=torch.float16)
        weight.data.copy_(restore(round_to_codes(weight.detach(), fitted), fitted))
    return model


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_pruned_checkpoint_stays_pruned(name: str) -> None:
    pruned, _ = applied(tiny_model(FAMILY, seed=1), make("wanda", {"sparsity": 0.3}))
    zeros = {site: weight == 0 for site, weight in weights(pruned).items()}
    found, notes = applied(pruned, make(name, QUANTIZERS[name]))
    assert all(bool((weight[zeros[site]] == 0).all()) for site, weight in weights(found).items())
    assert name != "gptq" or ["30.0% of the weights" in note and "stay zero" in note for note in notes] == [True]


@pytest.mark.parametrize("name", ["gptq", "gsq"])
def test_zeros_that_lie_on_the_grid_of_a_checkpoint_are_weights_like_others(name: str) -> None:
    model = rounded(tiny_model(FAMILY, seed=1))
    zeros = {site: weight == 0 for site, weight in weights(model).items()}
    found, notes = applied(model, make(name, QUANTIZERS[name]))
    moved = sum(int((weight[zeros[site]] != 0).sum()) for site, weight in weights(found).items())
    assert moved > 0.01 * sum(int(each.sum()) for each in zeros.values()) > 0
    assert name != "gptq" or ["not a mask" in note for note in notes] == [True]


def test_beside_zeros_of_this_recipe_all_zeros_are_a_mask() -> None:
    """However few they are, and whatever grid the rest lies on."""
    passes = make("magnitude", {"sparsity": 0.02}), make("gptq", {"scheme": "int3_g32"})
    before, _ = applied(rounded(tiny_model(FAMILY, seed=1)), passes[0])
    found, notes = applied(rounded(tiny_model(FAMILY, seed=1)), *passes)
    kept = weights(found)
    assert all(bool((kept[site][weight == 0] == 0).all()) for site, weight in weights(before).items()) and not notes
