"""The plain folder: ordinary weights, shards, tied weights once, names and layouts of the original."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmcompress.errors import CompressError
from llmcompress.exporters.save import save_model
from llmcompress.exporters.shards import ShardWriter, size_in_bytes
from tests.exporters.quantized import quantized_model
from tests.families import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untouched_model_is_written_as_it_was_read(tmp_path, family):
    """Same names, shapes and bits as transformers' own `save_pretrained`, for every family and both majors."""
    model = tiny_model(family, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    save_model(model, tmp_path / "ours", "plain", storage_dtype=torch.bfloat16, max_shard_size="5GB")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) and tensor.dtype == ours[name].dtype for name, tensor in theirs.items())


def test_shards_respect_the_limit_and_their_index(tmp_path):
    model = quantized_model("llama_gqa", ["int4_g32"])
    saved = save_model(model, tmp_path, "plain", storage_dtype=torch.bfloat16, max_shard_size="30KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(saved.weight_files) > 3 and set(index["weight_map"].values()) == set(saved.weight_files)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors*")) == sorted(
        [*saved.weight_files, "model.safetensors.index.json"]
    )
    total = 0
    for name in saved.weight_files:
        tensors = load_file(tmp_path / name)
        size = sum(tensor.nbytes for tensor in tensors.values())
        total += size
        assert size <= 30_000 or len(tensors) == 1
        with safe_open(tmp_path / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert total == index["metadata"]["total_size"] == saved.tensor_bytes


def test_tied_weights_are_written_once_and_said_to_be_tied(tmp_path):
    for family, tied in (("llama_gqa", True), ("llama", False)):
        save_model(tiny_model(family), tmp_path / family, "plain", storage_dtype=torch.float32, max_shard_size="5GB")
        tensors = load_file(tmp_path / family / "model.safetensors")
        assert ("lm_head.weight" in tensors) is not tied
        assert json.loads((tmp_path / family / "config.json").read_text())["tie_word_embeddings"] is tied


def test_a_head_untied_on_the_way_is_said_to_be_untied(tmp_path):
    model = tiny_model("llama_gqa")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    save_model(model, tmp_path, "plain", storage_dtype=torch.float32, max_shard_size="5GB")
    back = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(back.lm_head.weight, 2 * back.model.embed_tokens.weight)


def test_rounded_activations_are_refused(tmp_path):
    with pytest.raises(CompressError) as caught:
        save_model(
            quantized_model("llama", ["int8_channel_a8token"]),
            tmp_path,
            "plain",
            storage_dtype=torch.bfloat16,
            max_shard_size="5GB",
        )
    assert caught.value.code == "save.format" and "int8_channel there" in caught.value.fix


def test_a_view_takes_no_more_room_than_its_values(tmp_path):
    writer = ShardWriter(tmp_path, "1MB")
    bank = torch.arange(24.0).view(4, 3, 2)
    for expert in range(4):
        writer.add(f"experts.{expert}", bank[expert].T)
    writer.close()
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[f"experts.{i}"], bank[i].T) for i in range(4))


@pytest.mark.parametrize("size", ["1MB", "4KB"])
def test_files_are_those_of_the_library_byte_for_byte(size, tmp_path):
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.float8_e4m3fn, torch.uint8, torch.float16]
    tensors = {f"layer.{i}.é": torch.randn(5, 3 + i).to(dtype) for i, dtype in enumerate([*dtypes, *dtypes])}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "flags": torch.ones(3, dtype=torch.bool)}
    (tmp_path / "ours").mkdir()
    writer = ShardWriter(tmp_path / "ours", size)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    files = writer.close()
    assert sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors")) == sorted(files)
    assert not list((tmp_path / "ours").glob("*.part"))
    for file in files:
        theirs = {name: tensors[name] for name in load_file(tmp_path / "ours" / file)}
        save_file(theirs, tmp_path / "theirs", metadata={"format": "pt"})
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("20KB", 20_000)])
def test_sizes_are_read(text, size):
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["5", "5 GiB", "-1GB", "GB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="not a size"):
        size_in_bytes(text)
