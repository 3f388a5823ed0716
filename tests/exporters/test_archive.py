"""Archives: what was packed comes back bit for bit, loads like any folder, and damage is told by one code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmcompress import compress, export, footprint
from llmcompress.errors import CompressError
from llmcompress.exporters.archive import ArchiveExporter
from llmcompress.exporting import Exportable
from llmcompress.exporting import export as export_one
from llmcompress.formats import archive
from llmcompress.loading.load import load
from llmcompress.reopening import reopen
from llmcompress.verification.verifying import verified
from tests.exporters.gguf_models import tiny, tiny_quantized, tokenizer
from tests.tiny_folder import write_tiny_llama

IDS_BT = torch.arange(3, 23).reshape(2, 10)
GENERATOR = torch.Generator().manual_seed(0)


def pruned(dtype: torch.dtype) -> torch.Tensor:
    dense = torch.randn(40, 30, generator=GENERATOR)
    return torch.where(dense.abs() > 1, dense, torch.zeros(())).to(dtype)


TENSORS = {
    "bf16": torch.randn(33, 17, generator=GENERATOR).to(torch.bfloat16),
    "f32 scalar": torch.tensor(3.5),
    "empty": torch.empty(0),
    "pruned bf16": pruned(torch.bfloat16),
    "pruned f32": pruned(torch.float32),
    "minus zeros": torch.tensor([0.0, -0.0, 1.0, 0.0] * 8, dtype=torch.float16),
    "int8": torch.randint(-128, 128, (7, 9), generator=GENERATOR, dtype=torch.int8),
    "int64": torch.arange(50),
    "five-bit fields": torch.randint(0, 3, (9, 45), generator=GENERATOR, dtype=torch.uint8),
    "a row of bytes": torch.randint(0, 256, (77,), generator=GENERATOR, dtype=torch.uint8),
}


@pytest.mark.parametrize("name", TENSORS)
def test_every_layout_gives_back_what_it_was_given(name):
    tensor = TENSORS[name]
    for layout in archive._layouts(tensor):
        header = archive.Header(tensor.dtype, tuple(tensor.shape), layout, ())
        again = archive._put_together(header, archive._laid_out(tensor, layout))
        assert again.dtype == tensor.dtype and again.shape == tensor.shape
        assert torch.equal(archive._as_bytes(again), archive._as_bytes(tensor)), layout
    again = archive.unpack(archive.pack(tensor))
    assert again.dtype == tensor.dtype and torch.equal(archive._as_bytes(again), archive._as_bytes(tensor))


@pytest.mark.parametrize(("share", "most_bits"), [(0.9, 2.6), (0.5, 9.0)])
def test_zeros_cost_little(share, most_bits):
    dense = torch.randn(512, 256, generator=GENERATOR)
    sparse = torch.where(dense.abs() >= dense.abs().flatten().quantile(share), dense, torch.zeros(()))
    archived = archive.pack(sparse.to(torch.bfloat16))
    # a bit mask of entropy H(share), and of the others the entropy of a bfloat16's exponent and all of its mantissa
    assert 8 * archived.numel() / sparse.numel() < most_bits


def test_every_damaged_byte_is_noticed():
    archived = archive.pack(TENSORS["pruned bf16"])
    for place in range(0, archived.numel(), 7):
        damaged = archived.clone()
        damaged[place] ^= 16
        with pytest.raises(archive.BadArchive):
            archive.unpack(damaged)
    for length in (0, 3, 9, archived.numel() - 1):
        with pytest.raises(archive.BadArchive):
            archive.unpack(archived[:length])


def archived_folder(model: PreTrainedModel, folder: Path):
    exportable = Exportable(model, tokenizer(), "tiny", torch.bfloat16, model.generation_config)
    return export_one(exportable, ArchiveExporter(), folder, overwrite=False)


@pytest.mark.parametrize("name", ["llama", "llama_tied_biased"])
def test_from_pretrained_loads_it_after_our_import(name, tmp_path):
    model = tiny_quantized(name, ["int4_g32", "int3_g32_asym", "int8_channel", "nvfp4_a"])
    report = archived_folder(model, tmp_path / "out")
    assert report.read_back and not report.differing and report.unpacked_bytes
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(IDS_BT).logits, model(IDS_BT).logits)
    if model.config.tie_word_embeddings:
        assert again.lm_head.weight is again.model.embed_tokens.weight
    assert all(each.dtype != torch.uint8 or "weight" in name for name, each in again.state_dict().items())


def test_a_dense_model_is_archived_too_and_is_smaller(tmp_path):
    model = tiny("qwen2")
    for parameter in model.parameters():
        parameter.data = torch.where(parameter.abs() > parameter.abs().mean(), parameter, torch.zeros(()))
    report = archived_folder(model, tmp_path / "out")
    assert not report.differing and report.bytes < 0.9 * report.unpacked_bytes
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out", dtype=torch.float32).model(IDS_BT).logits, model(IDS_BT).logits)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "at rest" in text and "in memory" in text


def test_deep_compression_end_to_end(tmp_path):
    """Pruned, shared, levels trained, archived: what is loaded is what was trained, codes and levels bit for bit."""
    source, text = write_tiny_llama(tmp_path / "source", intermediate_size=64), tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (7 * place * place) % 26) for place in range(400)))
    training = {"steps": 3, "batch": 2, "learning_rate": 0.01}
    trained = [{"recover": {"teacher": "original", "train": "norms_and_scales", "training": training}}]
    recipe = {
        "calibration": {"source": str(text), "samples": 4, "tokens": 24},
        "passes": [{"magnitude": {"sparsity": 0.6}}, {"kmeans": {"bits": 4}}, *trained],
        "export": ["archive"],
        "save": {"dtype": "bfloat16"},
        "evaluate": {},
    }
    made = compress(source, recipe, tmp_path / "out")
    untrained = {**recipe, "passes": recipe["passes"][:2], "export": []}
    first = compress(source, untrained, tmp_path / "untrained").model
    folder = tmp_path / "out-archive"
    found = footprint(folder)
    assert found.format == "llmcompress" and found.bytes_on_disk < footprint(tmp_path / "out").bytes_on_disk
    opened = reopen(str(folder))
    with torch.no_grad():
        assert torch.equal(opened.model(IDS_BT).logits, made.model(IDS_BT).logits)
    for name, module in made.model.named_modules():
        if name.endswith("_proj"):
            weight_OI = module.dense_weight()
            assert len(weight_OI.unique()) <= 16
            assert abs(float((weight_OI == 0).float().mean()) - 0.6) < 0.05
            again = opened.model.get_submodule(name)
            for buffer, tensor in module.named_buffers():
                assert torch.equal(again.get_buffer(buffer), tensor), f"{name}.{buffer}"
            assert not torch.equal(module.get_buffer("levels_4"), first.get_submodule(name).get_buffer("levels_4"))
            assert torch.equal(module.get_buffer("codes_4"), first.get_submodule(name).get_buffer("codes_4"))
    assert not verified(folder, name="out").failed
    again = export(folder, "archive", tmp_path / "again", run=False)["archive"]
    assert not again.differing


def test_a_damaged_archive_ends_with_one_code(tmp_path):
    archived_folder(tiny_quantized("llama", ["int4_g32"]), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name][-3] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CompressError) as told:
        load(tmp_path / "out")
    assert told.value.code == "archive.damaged" and told.value.where == name
    tensors[name][:4] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CompressError) as told:
        footprint(tmp_path / "out")
    assert told.value.code == "archive.damaged" and name in told.value.where
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["archive"]["model.layers.9.gone"] = 5
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError) as told:
        load(tmp_path / "out")
    assert told.value.code == "archive.damaged"


def test_without_the_package_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(CompressError, match="zstandard") as told:
        archived_folder(tiny("llama"), tmp_path / "out")
    assert told.value.code == "archive.package" and "llmcompress[archive]" in told.value.fix
