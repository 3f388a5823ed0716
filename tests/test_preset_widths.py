"""Every preset can be planned on the real widths of models on the Hub, cut to four blocks; no weight exists."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from llmcompress.errors import CompressError
from llmcompress.exporters.choose import Choice
from llmcompress.exporters.loader import Loader, loader_of
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import probe
from llmcompress.model.units import groups_of
from llmcompress.modules.scheme import named_scheme
from llmcompress.passes.pruning.width import Width
from llmcompress.passes.schemes import SHORTEST_GROUP, fitting_group
from llmcompress.planning import check_recipe, fitted_to_model, planned_schemes, within_target_limits
from llmcompress.presets import load_preset, preset_names
from tests.hub_widths import CONFIGS, config_of, hub_map

PRESETS = [name for name in preset_names() if "/" not in name]

REFUSED: dict[tuple[str, str], str] = {}
"""Model and preset → why that is refused, in the words of the error."""


@cache
def known(model: str) -> tuple[ModelMap, Loader]:
    return hub_map(model), loader_of(config_of(model))


def checked(model: str, preset: str) -> Choice:
    model_map, loader = known(model)
    return check_recipe(within_target_limits(load_preset(preset)), model_map, loader, torch.bfloat16)


@pytest.mark.parametrize("model", ["HuggingFaceTB/SmolLM2-135M", "openai-community/gpt2", "EleutherAI/pythia-160m"])
def test_the_map_is_the_one_that_experiments_at_full_width_find(model: str) -> None:
    found, expected = hub_map(model), probe(config_of(model))
    assert [block.name for block in found.blocks] == [block.name for block in expected.blocks]
    for ours, theirs in zip(found.blocks, expected.blocks, strict=True):
        assert ours.structure == replace(theirs.structure, folds=())
    assert (found.vocabulary, found.hidden_size, found.tied) == (
        expected.vocabulary,
        expected.hidden_size,
        expected.tied,
    )


@pytest.mark.parametrize("model", CONFIGS)
def test_no_preset_is_refused(model: str) -> None:
    refused = {}
    for preset in PRESETS:
        try:
            checked(model, preset)
        except CompressError as error:
            refused[preset] = str(error)
    allowed = {preset: why for (name, preset), why in REFUSED.items() if name == model}
    assert refused.keys() == allowed.keys(), refused
    for preset, why in allowed.items():
        assert why in refused[preset]


@pytest.mark.parametrize("model", CONFIGS)
def test_linears_that_read_the_same_input_get_groups_alike_and_runtimes_have_kernels_for_them(model: str) -> None:
    """Runtimes fuse q, k, v and gate, up: one group length for all of them."""
    model_map, _ = known(model)
    schemes = planned_schemes(load_preset("w4"), model_map)
    for block in model_map.blocks:
        for group in block.structure.groups:
            assert len({schemes[block.full(name)] for name in group.sites}) == 1
    assert {scheme.weights.group for scheme in schemes.values()} <= {32, 64, 128}


@pytest.mark.parametrize(
    ("inputs", "group"),
    [(576, 64), (896, 128), (640, 128), (2048, 128), (4544, 64), (1120, 32), (172, None), (48, None)],
)
def test_the_longest_group_is_taken_that_divides(inputs: int, group: int | None) -> None:
    assert fitting_group(128, inputs) == group
    longer = [length for length in (32, 64, 128) if inputs % length == 0 and length > (group or 0)]
    assert not longer and (group or SHORTEST_GROUP) >= SHORTEST_GROUP


def test_a_resolved_recipe_names_the_schemes_that_fit() -> None:
    model_map, _ = known("HuggingFaceTB/SmolLM2-135M")
    recipe = within_target_limits(load_preset("w4"))
    resolved = fitted_to_model(recipe, model_map)
    strict = resolved.passes[0].model_copy(update={"on_indivisible": "error"})
    assert planned_schemes(recipe.model_copy(update={"passes": (strict,)}), model_map) == planned_schemes(
        recipe, model_map
    )
    assert strict.for_site("model.layers.0.self_attn.q_proj").scheme == "int4_g64"
    assert strict.for_site("model.layers.0.mlp.down_proj").scheme == "int4_g128"
    assert fitted_to_model(resolved, model_map) == resolved


def test_the_plan_says_once_which_schemes_are_others_than_asked_for() -> None:
    (note,) = (note for note in checked("HuggingFaceTB/SmolLM2-135M", "w4").notes if "int4_g128" in note)
    assert "q_proj" in note and "576 inputs" in note and named_scheme("int4_g64").name in note
    assert "down_proj" not in note
    assert not any("int4_g128" in note for note in checked("meta-llama/Llama-3.1-8B", "w4").notes)


def test_a_table_that_stays_dense_is_named_with_its_share_of_the_files() -> None:
    small = [note for note in checked("google/gemma-3-270m", "w4").notes if "the embedding, which is the head" in note]
    assert len(small) == 1 and "336 MB" in small[0]
    assert not any("which is the head" in note for note in checked("google/gemma-3-270m", "w3").notes)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.4])
def test_channels_make_up_for_heads_that_go_whole(fraction: float) -> None:
    """A quarter of 3 or 5 or 2 key-value groups cannot go, a quarter of the block's parameters can."""
    for model in CONFIGS:
        model_map, _ = known(model)
        width, block = Width(fraction=fraction), model_map.blocks[0]
        sites = {name for group in groups_of(block) for name in group.sites}
        weights = {block.full(site.name): site for site in block.structure.sites if block.full(site.name) in sites}
        total = sum(site.outputs * site.inputs for site in weights.values())
        kept = sum(
            width.kept_fraction(name, site, model_map) * site.outputs * site.inputs for name, site in weights.items()
        )
        assert 1 - kept / total == pytest.approx(fraction, abs=0.005), model
