"""What a pass decides by data can be said by ordinary options, and they make the same weights bit for bit."""

from typing import Any

import pytest
import torch

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.model.probe import map_model
from llmcompress.passes.base import PASSES, Pass
from llmcompress.recipe import Recipe, parse_recipe
from tests.families import tiny_model
from tests.passes.decomposition.factored import compressed, whole_model, windows

DECIDING: dict[str, tuple[str, dict[str, Any]]] = {
    "schemes per group": ("mixed_precision", {"bits": 4.5, "schemes": ["int2_g32", "int4_g32", "int8_g32"]}),
    "schemes per site": ("mixed_precision", {"bits": 4.0, "per": "site", "schemes": ["int2_g32", "int8_g32"]}),
    "ranks by energy": ("svd", {"fraction": 0.3, "ranks": "energy"}),
    "ranks by loss": ("svd", {"fraction": 0.3, "overrides": {"*.q_proj": {"rank": 5, "fraction": None}}}),
    "sparsity by outliers": ("wanda", {"sparsity": 0.5, "allocation": "outliers", "outlier_times": 3}),
    "sparsity by loss": ("sparsegpt", {"allocation": "loss", "overrides": {"*.o_proj": {"sparsity": 0.25}}}),
    "magnitude everywhere": ("magnitude", {"sparsity": 0.4, "comparison": "global"}),
    "units of equal shares": ("width", {"fraction": 0.25, "overrides": {"*.1.mlp.down_proj": {"fraction": 0.5}}}),
    "units of a common budget": ("width", {"fraction": 0.3, "allocation": "global", "refit": "bias"}),
    "units by norms": ("width", {"fraction": 0.3, "score": "l2", "heads": False, "refit": "none"}),
    "units by trial": ("bonsai", {"fraction": 0.2, "masks": 10, "windows": 2, "step": 0.2}),
    "blocks at once": ("depth", {"count": 1}),
    "blocks one by one": ("depth", {"count": 2, "mode": "greedy", "score": "perplexity"}),
}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize("what", DECIDING)
def test_the_recipe_that_says_it_makes_the_same_weights(what: str) -> None:
    name, options = DECIDING[what]
    deciding = PASSES[name].model_validate(options)
    decisions = deciding.decide(whole_model("llama_gqa"))
    assert decisions
    settled = deciding.with_decisions(decisions)
    assert settled is not None
    (again,) = parse_recipe(Recipe(passes=(settled,)).to_yaml(), "settled").passes
    assert again == settled and again != deciding
    expected, _ = compressed("llama_gqa", deciding)
    found, _ = compressed("llama_gqa", again)
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("what", DECIDING)
def test_what_is_said_is_not_decided_again(what: str) -> None:
    """Nothing is scored and no gradient is taken; the model may be another one of that shape."""
    name, options = DECIDING[what]
    deciding = PASSES[name].model_validate(options)
    settled = deciding.with_decisions(deciding.decide(whole_model("llama_gqa")))
    assert settled is not None
    assert settled.backward() is None
    other = tiny_model("llama_gqa", seed=5)
    whole = WholeModel(other, map_model(other), RunContext(windows(count=0)))
    first = settled.decide(whole)
    assert settled.with_decisions(first) in (settled, None) or not first


def test_blocks_that_go_can_be_named() -> None:
    model, rows = compressed("llama_gqa", PASSES["depth"](blocks=[0, 2]))
    assert [row.site for row in rows] == ["model.layers.0", "model.layers.2"]
    assert len(model.model.layers) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"blocks": [1], "count": 1}, "not both"), ({"blocks": [1, 1]}, "once"), ({"blocks": []}, "at least one")],
    ids=["both", "twice", "none"],
)
def test_blocks_are_named_once_and_instead_of_a_number(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PASSES["depth"](**options)


def test_units_that_go_can_be_named() -> None:
    removed = {"model.layers.1.mlp.down_proj": {"removed": "0-3, 7"}}
    width: Pass = PASSES["width"](fraction=0, refit="none", overrides=removed)
    dense, _ = compressed("llama_gqa")
    model, rows = compressed("llama_gqa", width)
    kept = [unit for unit in range(dense.config.intermediate_size) if unit not in (0, 1, 2, 3, 7)]
    here, there = (each.model.layers[1].mlp.down_proj.weight for each in (model, dense))
    assert torch.equal(here, there[:, kept])
    assert {row.site.split(".")[2] for row in rows} == {"1"}
