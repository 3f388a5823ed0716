"""The compressed-tensors folder: what its config says, what its tensors hold, what is refused before any work."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from compressed_tensors.utils.match import match_name
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from llmcompress.errors import CompressError, ExitCode
from llmcompress.exporters.base import Converted, Exact, Refused
from llmcompress.exporters.choose import choose
from llmcompress.exporters.compressed_tensors import CompressedTensorsExporter
from llmcompress.exporters.contents import planned_contents
from llmcompress.exporters.loader import Loader
from llmcompress.exporters.manifest import ManifestExporter
from llmcompress.exporters.quantization_config import name_patterns
from llmcompress.exporters.save import save_model
from llmcompress.model.map import BlockInfo, BlockStructure, ModelMap, SiteInfo
from llmcompress.modules.scheme import named_scheme
from tests.exporters.quantized import quantize, quantized_model
from tests.families import tiny_model


def _map(*sites: SiteInfo) -> ModelMap:
    structure = BlockStructure(sites=sites, groups=(), folds=(), width_groups=())
    block = BlockInfo(0, "layers.0", structure)
    return ModelMap("tiny", hidden_size=64, blocks=(block,), embedding="embed", head="head", tied=False)


PROJ = SiteInfo("proj", outputs=16, inputs=64, has_bias=False)
RAGGED = SiteInfo("ragged", outputs=16, inputs=70, has_bias=False)
CONV = SiteInfo("conv", outputs=16, inputs=64, has_bias=True, transposed=True)


def _contents(schemes, *sites: SiteInfo, dtype=None, loader=None):
    return planned_contents(_map(*sites), schemes, loader or Loader(), dtype)


def _answers(schemes, *sites: SiteInfo, loader=None, **options):
    return CompressedTensorsExporter(**options).answers(_contents(schemes, *sites, loader=loader))


def _notes(wanted, schemes, *sites: SiteInfo, **options):
    return choose(wanted, _contents(schemes, *sites), **options).notes


def _schemes(name: str) -> dict[str, object]:
    return {f"layers.0.{site.name}": named_scheme(name) for site in (PROJ, RAGGED, CONV)}


def test_config_names_every_linear_once_as_target_or_ignored(tmp_path):
    model = quantized_model("llama", ["int4_g32", "int8_channel", "int3_g32_asym"])
    names = [name for name, part in tiny_model("llama").named_modules() if isinstance(part, nn.Linear)]
    save_model(model, tmp_path, "auto", storage_dtype=torch.bfloat16, max_shard_size="5GB")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    groups = [group["targets"] for group in config["config_groups"].values()]
    assert config["quant_method"] == "compressed-tensors" and len(groups) == 2, "int3_g32_asym is stored as int4_g32"
    for name in names:
        hits = [target for targets in [*groups, config["ignore"]] for target in targets if match_name(name, target)]
        assert len(hits) == 1, name
    assert config["ignore"] == ["lm_head"]


def test_schemes_alike_on_disk_share_one_group_and_few_targets(tmp_path):
    model = quantized_model("llama", ["int4_g32"])
    save_model(model, tmp_path, "auto", storage_dtype=torch.bfloat16, max_shard_size="5GB")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert len(group["targets"]) == 7, "one per kind of linear, whatever the number of blocks"


@given(st.sets(st.tuples(st.integers(0, 12), st.sampled_from("abc"), st.integers(0, 3)), max_size=12), st.data())
def test_patterns_match_exactly_the_chosen_names(parts, data):
    everything = [f"m.layers.{i}.{leaf}.experts.{j}" for i, leaf, j in sorted(parts)] + ["lm_head", "m.embed.x"]
    chosen = data.draw(st.lists(st.sampled_from(everything), unique=True))
    patterns = name_patterns(chosen, everything)
    assert sorted(name for name in everything if any(match_name(name, p) for p in patterns)) == sorted(chosen)
    assert all(re.compile(pattern.removeprefix("re:")) for pattern in patterns)


def test_ragged_groups_and_conv1d_are_said_before_any_work():
    found = _answers(_schemes("int4_g32"), PROJ, RAGGED, CONV, multiplies_out=True)
    assert isinstance(found.pop("layers.0.proj"), Exact)
    assert set(found) == {"layers.0.ragged", "layers.0.conv"} and all(isinstance(x, Converted) for x in found.values())
    assert "70 inputs do not divide into groups of 32" in found["layers.0.ragged"].why


def test_auto_saves_them_multiplied_out_and_says_so():
    notes = _notes("auto", _schemes("int4_g32"), PROJ, RAGGED, CONV)
    assert len(notes) == 2 and all("dequantized" in note for note in notes)


def test_compressed_tensors_refuses_them_naming_site_and_fix():
    with pytest.raises(CompressError) as caught:
        choose("compressed-tensors", _contents(_schemes("int4_g32"), PROJ, RAGGED, CONV))
    assert caught.value.exit_code == ExitCode.USAGE
    assert "layers.0.ragged" in caught.value.where and "exclude" in caught.value.fix


def test_a_refusal_names_the_nearest_scheme_that_could_be_held():
    site = SiteInfo("odd", outputs=16, inputs=96, has_bias=False)
    found = _answers({"layers.0.odd": named_scheme("int4_g64_asym")}, site)
    assert found["layers.0.odd"].nearest == named_scheme("int4_g32_asym")


@pytest.mark.parametrize("wanted", ["compressed-tensors", "plain"])
def test_rounded_activations_are_refused_where_a_stock_format_cannot_hold_them(wanted):
    with pytest.raises(CompressError) as caught:
        choose(wanted, _contents({"layers.0.ragged": named_scheme("int8_g32_a8token")}, RAGGED))
    assert caught.value.code == "save.format"


def test_auto_then_takes_our_own_format_and_says_why():
    chosen = choose("auto", _contents({"layers.0.ragged": named_scheme("int8_g32_a8token")}, RAGGED))
    assert isinstance(chosen.exporter, ManifestExporter)
    assert "do not divide" in chosen.notes[0] and "import llmcompress" in chosen.notes[0]


def test_wider_fields_than_the_scheme_are_said():
    schemes = {"layers.0.proj": named_scheme("int4_g32_asym")}
    assert "8-bit fields" in _notes("auto", schemes, PROJ)[0]
    assert not _notes("auto", {"layers.0.proj": named_scheme("int4_g32")}, PROJ)


@pytest.mark.parametrize(
    ("scheme", "dtype", "reason"),
    [
        ("nf4_g32", None, "cannot represent"),
        ("fp4_g32", torch.bfloat16, "cannot represent"),
        ("mxfp4", torch.float16, "bfloat16 only"),
        ("nvfp4_a", torch.bfloat16, "differently"),
    ],
)
def test_what_stock_loaders_cannot_say_or_read_alike_takes_our_own_format(scheme, dtype, reason):
    contents = _contents({"layers.0.proj": named_scheme(scheme)}, PROJ, dtype=dtype)
    chosen = choose("auto", contents)
    assert isinstance(chosen.exporter, ManifestExporter) and reason in chosen.notes[0]


def test_who_asks_for_compressed_tensors_gets_it_in_spite_of_doubts():
    for scheme, dtype in (("mxfp4", torch.float16), ("nvfp4_a", torch.bfloat16)):
        contents = _contents({"layers.0.proj": named_scheme(scheme)}, PROJ, dtype=dtype)
        assert isinstance(choose("compressed-tensors", contents).exporter, CompressedTensorsExporter)
    with pytest.raises(CompressError, match="cannot represent nf4_g32"):
        choose("compressed-tensors", _contents({"layers.0.proj": named_scheme("nf4_g32")}, PROJ))


def test_experts_with_several_schemes_are_not_saved_as_codes():
    """transformers 5 would read all of them with the first scheme, and say nothing."""
    sites = tuple(SiteInfo(f"experts.{i}.up", outputs=8, inputs=64, has_bias=False) for i in range(2))
    schemes = {f"layers.0.experts.{i}.up": named_scheme(name) for i, name in enumerate(["int4_g32", "int8_channel"])}
    assert all(isinstance(each, Refused) for each in _answers(schemes, *sites).values())
    alike = dict.fromkeys(schemes, named_scheme("int4_g32"))
    assert all(isinstance(each, Exact) for each in _answers(alike, *sites).values())


def test_a_model_merged_on_load_has_no_site_that_fits():
    """transformers 5 expects codes in expert banks of a compressed-tensors folder."""
    schemes = {"layers.0.proj": named_scheme("int4_g32")}
    (merged,) = _answers(schemes, PROJ, loader=Loader(merges_experts=True)).values()
    (apart,) = _answers(schemes, PROJ).values()
    assert isinstance(merged, Refused) and isinstance(apart, Exact)


def test_experts_of_one_scheme_become_a_bank_of_codes():
    sites = tuple(SiteInfo(f"experts.{i}.up", outputs=8, inputs=64, has_bias=False) for i in range(2))
    schemes = {f"layers.0.experts.{i}.up": named_scheme("int4_g32") for i in range(2)}
    merging = Loader(merges_experts=True)
    assert all(isinstance(each, Exact) for each in _answers(schemes, *sites, loader=merging).values())
    one = {"layers.0.experts.0.up": named_scheme("int4_g32")}
    assert all(isinstance(each, Refused) for each in _answers(one, *sites, loader=merging).values())


def test_saver_reports_what_it_multiplied_out(tmp_path):
    model = quantized_model("llama", ["int4_g40", "int4_g32"])
    saved = save_model(model, tmp_path, "auto", storage_dtype=torch.bfloat16, max_shard_size="5GB")
    tensors = load_file(tmp_path / "model.safetensors")
    assert saved.format == "compressed-tensors" and 0 < len(saved.dense_sites) < 21
    assert all(f"{site}.weight" in tensors and f"{site}.weight_packed" not in tensors for site in saved.dense_sites)


def test_saver_refuses_rounded_activations_it_cannot_hold(tmp_path):
    model = quantized_model("llama", ["int8_g40_a8token"])
    with pytest.raises(CompressError) as caught:
        save_model(model, tmp_path, "compressed-tensors", storage_dtype=torch.bfloat16, max_shard_size="5GB")
    assert caught.value.code == "save.format"


def test_a_weight_too_large_for_the_stored_type_is_refused(tmp_path):
    model = tiny_model("llama")
    quantize(model, ["int4_g32"])
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5
    with pytest.raises(CompressError) as caught:
        save_model(model, tmp_path, "auto", storage_dtype=torch.float16, max_shard_size="5GB")
    assert caught.value.where == "model.norm.weight"


@pytest.mark.parametrize("scheme", ["int4_g32_asym", "int4_channel_asym", "int2_g32_asym"])
def test_packed_zero_points_are_as_small_as_the_grid_says_and_load(tmp_path, scheme):
    model = quantized_model("llama", [scheme])
    for form in ("packed", "folded"):
        save_model(model, tmp_path / form, "auto", storage_dtype=torch.bfloat16, max_shard_size="5GB", zero_points=form)
    packed, folded = (load_file(tmp_path / form / "model.safetensors") for form in ("packed", "folded"))
    name = next(name for name in packed if name.endswith("weight_packed"))
    assert 2 * packed[name].numel() == folded[name].numel()
    zero = packed[name.replace("weight_packed", "weight_zero_point")]
    assert zero.dtype == torch.int32
    # transformers 5 needs to be asked with the newer releases of the library, 4 reads them as they are
    five = not transformers.__version__.startswith("4.")
    asked = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if five else {}
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        got, expected = (
            AutoModelForCausalLM.from_pretrained(tmp_path / form, dtype=torch.bfloat16, **options).eval()(ids).logits
            for form, options in (("packed", asked), ("folded", {}))
        )
    assert torch.equal(got, expected)


def test_the_note_on_zero_points_says_what_loads_them():
    schemes = {"layers.0.proj": named_scheme("int4_g32_asym")}
    assert "dequantize=True" in _notes("auto", schemes, PROJ, zero_points="packed")[0]
    assert "save.zero_points" in _notes("auto", schemes, PROJ)[0]


def test_files_are_as_readable_as_any_new_file_and_say_nothing_of_this_machine(tmp_path):
    model = quantized_model("llama", ["int4_g32"])
    model.config._name_or_path = str(tmp_path)
    save_model(model, tmp_path / "out", "auto", storage_dtype=torch.bfloat16, max_shard_size="5GB")
    (tmp_path / "new").touch()
    files = list((tmp_path / "out").iterdir())
    assert {path.stat().st_mode for path in files} == {(tmp_path / "new").stat().st_mode}
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
