"""The compressed-tensors folder: what its config says, what its tensors hold, what is refused before any work."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.utils.match import match_name
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from llmcompress.errors import CompressError, ExitCode
from llmcompress.export.base import Loader, check_format, layout_on_disk, unsupported
from llmcompress.export.compressed_tensors import coded_tensors, save_compressed_tensors
from llmcompress.export.quantization_config import name_patterns
from llmcompress.model.map import BlockInfo, BlockStructure, ModelMap, SiteInfo
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.ranges import fit
from tests.export.quantized import quantize, quantized_model
from tests.families import tiny_model

ALL_SCHEMES = [
    f"int{bits}_{size}{asym}" for bits in (2, 3, 4, 8) for size in ("channel", "g8") for asym in ("", "_asym")
]


def _map(*sites: SiteInfo) -> ModelMap:
    structure = BlockStructure(sites=sites, groups=(), folds=(), width_groups=())
    block = BlockInfo(0, "layers.0", structure)
    return ModelMap("tiny", hidden_size=64, blocks=(block,), embedding="embed", head="head", tied=False)


PROJ = SiteInfo("proj", outputs=16, inputs=64, has_bias=False)
RAGGED = SiteInfo("ragged", outputs=16, inputs=70, has_bias=False)
CONV = SiteInfo("conv", outputs=16, inputs=64, has_bias=True, transposed=True)


def _schemes(name: str) -> dict[str, object]:
    return {f"layers.0.{site.name}": named_scheme(name) for site in (PROJ, RAGGED, CONV)}


@pytest.mark.parametrize("packable", [True, False])
@pytest.mark.parametrize("name", ALL_SCHEMES)
def test_stored_codes_are_the_weights_exactly(name, packable):
    scheme = named_scheme(name)
    weight_OI = torch.randn(24, 48, generator=torch.Generator().manual_seed(1)) + 0.3
    fitted = fit(weight_OI, scheme.weights, scale_dtype=torch.bfloat16)
    site = QuantLinear.from_fitted(scheme, round_to_codes(weight_OI, fitted), fitted, None)
    layout = layout_on_disk(scheme, packable=packable)
    stored = coded_tensors(site, layout, torch.bfloat16)
    codes = stored.get("weight")
    if codes is None:
        codes = unpack_from_int32(stored["weight_packed"], layout.bits, torch.Size([24, 48]))
        assert stored["weight_packed"].nbytes * 8 == layout.bits_on_disk * codes.numel()
    groups = stored["weight_scale"].shape[1]
    zero = stored.get("weight_zero_point", torch.zeros(24, groups))
    restored = (codes.float().view(24, groups, -1) - zero[..., None].float()) * stored["weight_scale"].float()[
        ..., None
    ]
    assert torch.equal(restored.view(24, 48), site.dense_weight())


def test_config_names_every_linear_once_as_target_or_ignored(tmp_path):
    model = quantized_model("llama", ["int4_g32", "int8_channel", "int3_g32_asym"])
    names = [name for name, part in tiny_model("llama").named_modules() if isinstance(part, nn.Linear)]
    save_compressed_tensors(model, tmp_path, storage_dtype=torch.bfloat16, max_shard_size="5GB")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    groups = [group["targets"] for group in config["config_groups"].values()]
    assert config["quant_method"] == "compressed-tensors" and len(groups) == 2, "int3_g32_asym is stored as int4_g32"
    for name in names:
        hits = [target for targets in [*groups, config["ignore"]] for target in targets if match_name(name, target)]
        assert len(hits) == 1, name
    assert config["ignore"] == ["lm_head"]


def test_schemes_alike_on_disk_share_one_group_and_few_targets(tmp_path):
    model = quantized_model("llama", ["int4_g32"])
    save_compressed_tensors(model, tmp_path, storage_dtype=torch.bfloat16, max_shard_size="5GB")
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
    found = {row.site: row for row in unsupported(_map(PROJ, RAGGED, CONV), _schemes("int4_g32"))}
    assert set(found) == {"layers.0.ragged", "layers.0.conv"} and all(row.dense_instead for row in found.values())
    assert "70 inputs do not divide into groups of 32" in found["layers.0.ragged"].reason


def test_auto_saves_them_multiplied_out_and_says_so():
    notes = check_format("auto", _map(PROJ, RAGGED, CONV), _schemes("int4_g32"))
    assert len(notes) == 2 and all("multiplied out" in note for note in notes)


def test_compressed_tensors_refuses_them_naming_site_and_fix():
    with pytest.raises(CompressError) as caught:
        check_format("compressed-tensors", _map(PROJ, RAGGED, CONV), _schemes("int4_g32"))
    assert caught.value.exit_code == ExitCode.USAGE
    assert "layers.0.ragged" in caught.value.where and "exclude" in caught.value.fix


@pytest.mark.parametrize("wanted", ["auto", "plain"])
def test_rounded_activations_are_refused_where_nothing_can_hold_them(wanted):
    with pytest.raises(CompressError) as caught:
        check_format(wanted, _map(RAGGED), {"layers.0.ragged": named_scheme("int8_g32_a8token")})
    assert caught.value.code == "save.format"


def test_wider_fields_than_the_scheme_are_said():
    schemes = {"layers.0.proj": named_scheme("int4_g32_asym")}
    assert "8-bit fields" in check_format("auto", _map(PROJ), schemes)[0]
    assert not check_format("auto", _map(PROJ), {"layers.0.proj": named_scheme("int4_g32")})


def test_experts_with_several_schemes_are_not_saved_as_codes():
    """transformers 5 would read all of them with the first scheme, and say nothing."""
    sites = tuple(SiteInfo(f"experts.{i}.up", outputs=8, inputs=64, has_bias=False) for i in range(2))
    schemes = {f"layers.0.experts.{i}.up": named_scheme(name) for i, name in enumerate(["int4_g32", "int8_channel"])}
    assert len(unsupported(_map(*sites), schemes)) == 2
    assert not unsupported(_map(*sites), dict.fromkeys(schemes, named_scheme("int4_g32")))


def test_a_model_merged_on_load_has_no_site_that_fits():
    """transformers 5 expects codes in expert banks of a compressed-tensors folder."""
    schemes = {"layers.0.proj": named_scheme("int4_g32")}
    assert unsupported(_map(PROJ), schemes, Loader(merges_experts=True)) and not unsupported(_map(PROJ), schemes)


def test_saver_reports_what_it_multiplied_out(tmp_path):
    model = quantized_model("llama", ["int4_g40", "int4_g32"])
    saved = save_compressed_tensors(model, tmp_path, storage_dtype=torch.bfloat16, max_shard_size="5GB")
    tensors = load_file(tmp_path / "model.safetensors")
    assert saved.format == "compressed-tensors" and 0 < len(saved.dense_sites) < 21
    assert all(f"{site}.weight" in tensors and f"{site}.weight_packed" not in tensors for site in saved.dense_sites)


def test_saver_refuses_rounded_activations_it_cannot_hold(tmp_path):
    model = quantized_model("llama", ["int8_g40_a8token"])
    with pytest.raises(CompressError) as caught:
        save_compressed_tensors(model, tmp_path, storage_dtype=torch.bfloat16, max_shard_size="5GB")
    assert caught.value.code == "save.format"


def test_a_weight_too_large_for_the_stored_type_is_refused(tmp_path):
    model = tiny_model("llama")
    quantize(model, ["int4_g32"])
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5
    with pytest.raises(CompressError) as caught:
        save_compressed_tensors(model, tmp_path, storage_dtype=torch.float16, max_shard_size="5GB")
    assert caught.value.where == "model.norm.weight"


@pytest.mark.parametrize("scheme", ["int4_g32_asym", "int4_channel_asym", "int2_g32_asym"])
def test_packed_zero_points_are_as_small_as_the_grid_says_and_load(tmp_path, scheme):
    model = quantized_model("llama", [scheme])
    for form in ("packed", "folded"):
        save_compressed_tensors(
            model, tmp_path / form, storage_dtype=torch.bfloat16, max_shard_size="5GB", zero_points=form
        )
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
    assert "dequantize=True" in check_format("auto", _map(PROJ), schemes, zero_points="packed")[0]
    assert "save.zero_points" in check_format("auto", _map(PROJ), schemes)[0]


def test_files_are_as_readable_as_any_new_file_and_say_nothing_of_this_machine(tmp_path):
    model = quantized_model("llama", ["int4_g32"])
    model.config._name_or_path = str(tmp_path)
    save_compressed_tensors(model, tmp_path / "out", storage_dtype=torch.bfloat16, max_shard_size="5GB")
    (tmp_path / "new").touch()
    files = list((tmp_path / "out").iterdir())
    assert {path.stat().st_mode for path in files} == {(tmp_path / "new").stat().st_mode}
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
