"""What every exporter answers, and that a recipe which names its target is quantized for it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from llmcompress import compress
from llmcompress.exporters.base import EXPORTERS, Converted, Exact, Refused
from llmcompress.exporters.choose import choose, limits_of
from llmcompress.exporters.contents import CodedLinear, Contents, contents_in, planned_contents
from llmcompress.exporters.loader import loader_of
from llmcompress.exporters.manifest import ManifestExporter
from llmcompress.model.experts import unfuse_experts
from llmcompress.model.probe import map_model
from llmcompress.modules.limits import TargetLimits
from llmcompress.modules.scheme import named_scheme
from llmcompress.passes.quantization.rtn import RoundToNearest
from llmcompress.planning import within_target_limits
from llmcompress.recipe.model import Recipe, Save
from llmcompress.runners.base import Runner
from tests.exporters.quantized import quantized_model
from tests.families import tiny_model
from tests.tiny_folder import write_tiny_llama

SCHEMES = ["int4_g32", "ternary_g32", "int3_g32_asym", "int8_channel_a8token", "fp8_g32", "nf4_g32", "nvfp4_a", "mxfp4"]
SCHEMES += ["q4_k", "q6_k"]


@pytest.mark.parametrize("name", sorted(EXPORTERS))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_exporter_answers_for_every_scheme(name, scheme):
    site = CodedLinear("layers.0.proj", named_scheme(scheme), outputs=16, inputs=64)
    exporter = EXPORTERS[name]()
    answer = exporter.check(site, torch.bfloat16)
    assert isinstance(answer, Exact | Converted | Refused) and exporter.fix
    assert exporter.cannot_run or issubclass(exporter.runner(), Runner)
    if isinstance(answer, Refused):
        assert answer.why
    if isinstance(answer, Exact):
        assert exporter.tensors(site, torch.bfloat16)


@pytest.mark.parametrize(
    ("family", "schemes"),
    [
        ("llama", ["int4_g32", "int8_channel", "int3_g32_asym"]),
        ("llama", ["nf4_g32"]),
        ("llama", ["int8_channel_a8token"]),
        ("gpt2", ["int4_g32"]),
        ("falcon", ["int4_g32"]),
        ("mixtral", ["int4_g32"]),
    ],
)
def test_what_is_foretold_and_what_is_found_get_the_same_answers(family, schemes):
    stock = tiny_model(family)
    live = quantized_model(family, schemes)
    found = contents_in(live, torch.bfloat16)
    named = {site.name: site.scheme for site in found.sites}
    unfuse_experts(stock)
    model_map = map_model(stock)
    plan = planned_contents(model_map, named, loader_of(stock.config), torch.bfloat16)
    before, after = (choose("auto", contents) for contents in (plan, found))
    assert before.exporter == after.exporter and dict(before.answers) == dict(after.answers)


def test_a_stock_model_is_saved_plain_whatever_is_asked_for():
    for wanted in ("auto", "plain", "compressed-tensors", "llmcompress"):
        assert EXPORTERS.name_of(type(choose(wanted, Contents()).exporter)) == "plain"


@pytest.mark.parametrize("positive", [True, False])
def test_a_recipe_that_names_its_target_is_quantized_for_it(positive, tmp_path, monkeypatch):
    monkeypatch.setattr(ManifestExporter, "limits", TargetLimits(positive_scales=positive))
    recipe = Recipe(passes=(RoundToNearest(scheme="int4_g16"),), save=Save(format="llmcompress"), evaluate={})
    compress(str(write_tiny_llama(tmp_path / "model")), recipe, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scales = torch.cat([tensor.flatten() for name, tensor in tensors.items() if name.endswith(".scale")])
    assert bool((scales > 0).all()) is positive


def test_no_target_of_today_changes_a_recipe():
    for wanted in ("auto", "plain", "compressed-tensors", "llmcompress"):
        recipe = Recipe(passes=(RoundToNearest(scheme="int4_g16"),), save=Save(format=wanted))
        assert not limits_of(wanted).positive_scales
        assert within_target_limits(recipe) == recipe and within_target_limits(recipe).hash() == recipe.hash()
