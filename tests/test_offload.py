"""Weights on disk, one block in memory: the same result, bit for bit, in every family and after every interruption."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmcompress import CompressError, compress, plan
from llmcompress.calibration.offloading import OnDisk
from llmcompress.cost import must_offload
from llmcompress.loading.config import read_config
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.mapped import map_weights
from llmcompress.loading.source import find_source
from llmcompress.model.skeleton import find_blocks
from llmcompress.passes.base import PASSES
from llmcompress.recipe import Recipe, parse_recipe
from tests.families import FAMILIES, tiny_config, tiny_model
from tests.tiny_folder import write_tiny_llama
from tests.warm_python import WarmPython

RECIPES = {
    "gptq": "passes: [{gptq: {scheme: int4_g16}}]",
    "two stages": "passes: [{wanda: {sparsity: 0.5, allocation: outliers}}, {gptq: {scheme: int8_channel_a8token}}]",
    "plain": "passes: [{sparsegpt: {sparsity: 0.5}}]",
    "a block that falls back": "passes: [{wanda: {sparsity: 0.5}}]",
}
SETTINGS = """
calibration: {samples: 6, tokens: 48, batch: 4}
evaluate: {perplexity: [{source: 'builtin:evaluation', window: 48, max_windows: 3}]}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(
        tmp_path_factory.mktemp("model") / "tiny", hidden_size=64, intermediate_size=96, num_hidden_layers=3
    )


def recipe(text: str) -> Recipe:
    return parse_recipe(SETTINGS + text, "test")


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", RECIPES)
def test_offloaded_equals_resident_bit_for_bit(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache of here"))
    here = compress(str(tiny), recipe(RECIPES[name]), tmp_path / "here", offload="never").report
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache of there"))
    there = compress(str(tiny), recipe(RECIPES[name]), tmp_path / "there", offload="always").report
    assert weights_hash(tmp_path / "here") == weights_hash(tmp_path / "there")
    assert (tmp_path / "here" / "config.json").read_text() == (tmp_path / "there" / "config.json").read_text()
    assert here.quality == there.quality and here.sites == there.sites
    replaced = any("replaced by magnitude" in (row.degraded or "") for row in there.sites)
    assert replaced or name != "a block that falls back"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_computes_the_same_from_disk_and_takes_no_memory_afterwards(family: str, tmp_path: Path) -> None:
    tiny_model(family, dtype=torch.float16).save_pretrained(tmp_path / "model")
    resident = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    config, _ = read_config(tmp_path / "model")
    model, weights = map_weights(
        tmp_path / "model", config, tmp_path / "scratch", dtype=torch.float16, trust_remote_code=False
    )
    weights_at = OnDisk(weights)
    tokens = torch.arange(3, 40)[None] % 100
    with weights_at.running(model, torch.device("cpu")):
        found = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(found, resident(input_ids=tokens, use_cache=False).logits, rtol=0, atol=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "passes",
    ["gptq: {scheme: int4_g16}", "sparsegpt: {sparsity: 0.5}", "rtn: {scheme: nf4_g16, exclude: '*.experts.*'}"],
    ids=["codes", "zeros", "manifest"],
)
def test_experts_on_disk_become_what_experts_in_memory_become(family: str, passes: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    config.vocab_size = 288
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.float16)
    write_tiny_llama(tmp_path / "model")  # for its tokenizer
    model.save_pretrained(tmp_path / "model")
    for name, offload in (("here", "never"), ("there", "always")):
        compress(str(tmp_path / "model"), recipe(f"passes: [{{{passes}}}]"), tmp_path / name, offload=offload)
    assert weights_hash(tmp_path / "here") == weights_hash(tmp_path / "there")
    assert (tmp_path / "here" / "config.json").read_text() == (tmp_path / "there" / "config.json").read_text()


def test_a_block_that_left_lies_in_its_file_again(tiny: Path, tmp_path: Path) -> None:
    loaded = load_for_compression(find_source(str(tiny)), scratch=tmp_path / "scratch")
    assert loaded.weights is not None
    weights_at, (name, block) = OnDisk(loaded.weights), find_blocks(loaded.model)[1]
    block.to(torch.float32)
    kept = {key: tensor + 1 for key, tensor in block.state_dict().items()}
    weights_at.leave(name, block)
    before = loaded.weights[f"{name}.self_attn.q_proj.weight"]
    assert torch.equal(block.get_parameter("self_attn.q_proj.weight"), before)
    weights_at.moved(name, lambda: {key: tensor.clone() for key, tensor in kept.items()})
    weights_at.leave(name, block)
    assert torch.equal(block.get_parameter("self_attn.q_proj.weight"), before.float() + 1)


def test_a_head_that_is_the_embedding_stays_it(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    loaded = load_for_compression(find_source(str(folder)), scratch=tmp_path / "scratch")
    assert loaded.weights is not None
    weights_at = OnDisk(loaded.weights)
    for _ in range(2):
        with weights_at.running(loaded.model, torch.device("cpu")):
            loaded.model(input_ids=torch.arange(5)[None], use_cache=False)
        assert loaded.model.get_input_embeddings().weight is loaded.model.get_output_embeddings().weight


KILLED = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from llmcompress import compress
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe

class Dying(Silent):
    def step(self, text):
        if text.endswith("block 2/3"):
            os._exit(9)

compress(sys.argv[1], parse_recipe(Path(sys.argv[3]).read_text(), "test"), sys.argv[2],
         offload="always", progress=Dying())
"""


def test_killed_offloaded_and_resumed_either_way_equals_uninterrupted(
    tiny: Path, tmp_path: Path, our_python: WarmPython
) -> None:
    text = SETTINGS + RECIPES["gptq"]
    (tmp_path / "recipe.yaml").write_text(text)
    killed = our_python.run(KILLED, tiny, tmp_path / "out", tmp_path / "recipe.yaml")
    assert killed.returncode == 9 and (tmp_path / "out.run").exists()
    compress(str(tiny), recipe(RECIPES["gptq"]), tmp_path / "out", offload="always")
    compress(str(tiny), recipe(RECIPES["gptq"]), tmp_path / "whole", offload="never")
    assert weights_hash(tmp_path / "out") == weights_hash(tmp_path / "whole")


@pytest.mark.parametrize("pass_", ["{depth: {count: 1}}", "{wanda: {allocation: loss}}"])
def test_passes_that_need_the_whole_model_are_named_before_any_work(tiny: Path, tmp_path: Path, pass_: str) -> None:
    with pytest.raises(CompressError, match="some passes need") as caught:
        compress(str(tiny), recipe(f"passes: [{pass_}]"), tmp_path / "out", offload="always")
    assert caught.value.code == "memory.needed" and not (tmp_path / "out.run").exists()
    assert pass_[1:].partition(":")[0] in str(caught.value)


def test_auto_keeps_weights_on_disk_only_when_memory_would_not_hold_them() -> None:
    passes = [PASSES["gptq"]()]
    free = psutil.virtual_memory().available
    assert not must_offload("auto", passes, weight_bytes=10**6)
    assert must_offload("auto", passes, weight_bytes=free)
    assert not must_offload("never", passes, weight_bytes=free)
    assert not must_offload("auto", [PASSES["depth"](count=1)], weight_bytes=free)  # nothing else would run at all


def test_auto_compares_weights_in_float32_with_seven_tenths_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On disk they take 16 bits each."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    fits = [not must_offload("auto", [PASSES["gptq"]()], weight_bytes=count) for count in (349, 351)]
    assert fits == [True, False]


def test_the_plan_foretells_less_memory_when_weights_stay_on_disk(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=12)
    quick = parse_recipe("passes: [{rtn: {scheme: int8_channel}}]\nevaluate: {perplexity: []}", "test")
    never, always = (plan(str(folder), quick, offload=each) for each in ("never", "always"))
    assert always.offloaded and not never.offloaded and always.peak_memory_bytes < never.peak_memory_bytes


def own_bytes(model: nn.Module) -> int:
    tensors: list[Tensor] = [*model.parameters()]
    return sum(tensor.nbytes for tensor in tensors if tensor.dtype == torch.float32)


def test_only_one_block_is_ever_in_memory(tiny: Path, tmp_path: Path) -> None:
    loaded = load_for_compression(find_source(str(tiny)), scratch=tmp_path / "scratch")
    assert loaded.weights is not None
    weights_at = OnDisk(loaded.weights)
    most: list[int] = []

    def note(*_: Any) -> None:
        most.append(own_bytes(loaded.model))

    blocks = [block for _, block in find_blocks(loaded.model)]
    with weights_at.running(loaded.model, torch.device("cpu")):
        handles = [block.mlp.register_forward_hook(note) for block in blocks]  # type: ignore[operator, union-attr]
        loaded.model(input_ids=torch.arange(5)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    assert max(most) == sum(4 * parameter.numel() for parameter in blocks[0].parameters())
