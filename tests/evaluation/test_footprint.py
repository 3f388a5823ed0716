from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest
import torch
from torch import nn

from llmcompress.errors import CompressError
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.footprint import bytes_on_disk, footprint, ideal_bytes, parameters, ratios
from llmcompress.exporters.save import save_model
from llmcompress.modules.low_rank import LowRankLinear
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.ranges import fit
from tests.exporters.quantized import quantized_model
from tests.families import FAMILIES, tiny_model
from tests.tiny_folder import edit_json, edit_tensors
from tests.tiny_text import tiny_llama


def quantized(scheme_name: str, outputs: int, inputs: int) -> QuantLinear:
    scheme, weight = named_scheme(scheme_name), torch.randn(outputs, inputs)
    fitted = fit(weight, scheme.weights)
    return QuantLinear.from_fitted(scheme, round_to_codes(weight, fitted), fitted, None)


def weights_of(model: nn.Module) -> int:
    """Weights that are not exactly zero, in codes and outside."""
    coded = sum(int(part.dense_weight().count_nonzero()) for part in model.modules() if isinstance(part, QuantLinear))
    return coded + sum(int(parameter.count_nonzero()) for parameter in model.parameters())


def test_bits_of_a_quantized_linear_by_hand():
    model = nn.Sequential(quantized("int4_g32_asym", 8, 64), nn.Linear(5, 3))
    codes, groups = 8 * 64 * 4, 8 * 2 * (32 + 4)  # float32 scales and 4-bit zero points
    assert parameters(model) == 8 * 64 + 5 * 3 + 3
    assert ideal_bytes(model) == (codes + groups) // 8 + 4 * 18


def test_factors_count_as_the_numbers_they_are():
    low_rank = LowRankLinear.from_factors(torch.randn(8, 2), torch.randn(2, 10), torch.randn(8))
    assert parameters(low_rank) == 8 * 2 + 2 * 10 + 8
    low_rank.left = quantized("int4_channel", 8, 2)
    assert parameters(low_rank) == 8 * 2 + 2 * 10
    assert ideal_bytes(low_rank) == (8 * 2 * 4 + 8 * 32) // 8 + 4 * 20


def test_tied_weights_count_once():
    model = tiny_llama()
    untied = parameters(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert untied - parameters(model) == model.lm_head.weight.numel()


def test_zeros_are_not_a_saving(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "full")
    full = footprint(tmp_path / "full")
    for parameter in model.parameters():
        parameter.data.zero_()
    model.save_pretrained(tmp_path / "zeros")
    zeros = footprint(tmp_path / "zeros")
    labelled = {"model", "nonzero", "sparse_ideal_bytes"}
    assert zeros.model_dump(exclude=labelled) == full.model_dump(exclude=labelled)
    assert full.ideal_bits_per_weight == 32
    assert full.stored_bits_per_weight >= 32
    assert full.nonzero == full.parameters and zeros.nonzero == 0
    assert zeros.sparse_ideal_bytes == -(-zeros.parameters // 8), "a bit for every place, and no values"
    assert full.sparse_ideal_bytes == full.ideal_bytes, "never more than dense"


def test_sparse_bytes_are_values_and_a_bit_per_place_where_that_is_less(tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    up = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        up.copy_(torch.ones_like(up))
        up[:, ::2] = 0
    model.save_pretrained(tmp_path)
    found = footprint(tmp_path)
    assert found.nonzero == found.parameters - up.numel() // 2
    assert found.ideal_bytes - found.sparse_ideal_bytes == 2 * up.numel() - (up.numel() + up.numel() // 8)


def test_bytes_on_disk_are_those_of_the_weight_files_that_are_loaded(tmp_path):
    sizes = {"model-1.safetensors": 10, "model-2.safetensors": 20, "stale.safetensors": 40, "old.bin": 80, "x.json": 5}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    assert bytes_on_disk(tmp_path) == 70
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert bytes_on_disk(tmp_path) == 30


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_of_any_family_counts_as_the_live_one(family: str, tmp_path: Path):
    model = tiny_model(family, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    found = footprint(tmp_path)
    assert (found.parameters, found.ideal_bytes) == (parameters(model), ideal_bytes(model))
    assert found.nonzero == weights_of(model)
    assert found.format == "plain" and found.codes == 0 and found.entropy_bits_per_code is None
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert found.embedding == embedding.weight.numel()
    assert found.head == (0 if head.weight is embedding.weight else sum(p.numel() for p in head.parameters()))
    inside = [p.numel() for name, p in model.named_parameters() if any(part.isdigit() for part in name.split("."))]
    assert found.blocks == sum(inside)
    assert found.stored_bytes <= found.bytes_on_disk == (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    "schemes",
    [
        ["mxfp4", "nvfp4", "fp8_tensor"],
        ["int4_g32"],
        ["int8_channel_a8token"],
        ["int4_g32_asym"],
        ["int3_g32", "int8_g32_asym"],
    ],
    ids=str,
)
@pytest.mark.parametrize("zero_points", ["folded", "packed"])
def test_codes_in_a_compressed_tensors_folder_count_as_what_they_stand_for(
    schemes: list[str], zero_points, tmp_path: Path
):
    model = quantized_model("llama_gqa", schemes)
    save_model(model, tmp_path, "auto", storage_dtype=torch.bfloat16, max_shard_size="5GB", zero_points=zero_points)
    report_of(model, tmp_path)
    found = footprint(tmp_path)
    live = model.to(torch.bfloat16)
    assert found.format == "compressed-tensors"
    assert (found.parameters, found.ideal_bytes) == (parameters(live), ideal_bytes(live))
    assert found.nonzero == weights_of(live)
    assert found.codes == sum(p.codes_OI.numel() for p in live.modules() if isinstance(p, QuantLinear))
    assert found.entropy_bits_per_code <= found.huffman_bits_per_code < found.entropy_bits_per_code + 1
    (tmp_path / "llmcompress_report.json").unlink()
    assert footprint(tmp_path).ideal_bytes >= found.ideal_bytes, "without the report, fields may be wider than the grid"


def report_of(model: nn.Module, folder: Path) -> None:
    """The part of our report that names the grids."""
    rows = [
        {"site": name, "algorithm": "rtn", "scheme": part.scheme.name}
        for name, part in model.named_modules()
        if isinstance(part, QuantLinear)
    ]
    (folder / "llmcompress_report.json").write_text(json.dumps({"sites": rows}))


def test_codes_in_a_folder_of_our_own_are_found_inside_other_modules(tmp_path: Path):
    model = tiny_model("llama_gqa")
    mlp = model.model.layers[1].mlp
    mlp.up_proj = LowRankLinear(quantized("int3_g32_asym", 8, 64), quantized("int4_channel", 96, 8))
    mlp.down_proj = quantized("int3_g32", 64, 96)
    save_model(model, tmp_path, "auto", storage_dtype=torch.float32, max_shard_size="5GB")
    found = footprint(tmp_path)
    assert found.format == "llmcompress"
    assert (found.parameters, found.ideal_bytes) == (parameters(model), ideal_bytes(model))
    assert found.nonzero == weights_of(model)
    assert found.codes == 8 * 64 + 96 * 8 + 64 * 96
    assert found.stored_bytes < footprint_of_plain(model, tmp_path / "plain")


def footprint_of_plain(model: nn.Module, folder: Path) -> int:
    save_model(model, folder, "plain", storage_dtype=torch.float32, max_shard_size="5GB")
    return footprint(folder).stored_bytes


def test_a_head_stored_beside_its_own_embedding_counts_once(tmp_path: Path):
    model = tiny_model("llama_gqa")
    model.save_pretrained(tmp_path)
    once = footprint(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", lm_head__weight=model.lm_head.weight.detach().clone())
    twice = footprint(tmp_path)
    assert (twice.parameters, twice.ideal_bytes) == (once.parameters, once.ideal_bytes)
    assert twice.bytes_on_disk > once.bytes_on_disk


def test_ratios_compare_two_models(tmp_path: Path):
    for name, layers in (("small", 1), ("large", 2)):
        model = tiny_llama()
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        model.save_pretrained(tmp_path / name)
    found = ratios(footprint(tmp_path / "small"), footprint(tmp_path / "large"))
    assert found["blocks"] == 0.5 and 0.5 < found["parameters"] < 1


def test_an_unknown_format_is_refused_by_name(tmp_path: Path):
    tiny_llama().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "aqlm", "bits": 4})
    with pytest.raises(CompressError) as caught:
        footprint(tmp_path)
    assert caught.value.code == "footprint.format" and "aqlm" in caught.value.what


def test_environment_names_versions_and_machine_but_no_user_host_or_path():
    known = {**versions(), **machine()}
    assert known["torch"] == torch.__version__
    assert {"python", "transformers", "compressed-tensors", "llmcompress", "cpu", "cores", "memory", "gpu"} <= set(
        known
    )
    text = " ".join(known.values())
    assert platform.node() not in text.split()
    assert os.path.expanduser("~") not in text
