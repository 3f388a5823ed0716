"""What no stock format can say: the plug-in rebuilds it in a fresh process, and a plain loader refuses the folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError
from llmcompress.exporters.save import save_model
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.model.skeleton import find_blocks
from llmcompress.model.stock import stock_model
from llmcompress.modules.manifest import Manifest, apply_manifest, changes
from llmcompress.passes.apply import apply_passes
from llmcompress.recipe import parse_recipe
from tests.families import tiny_model, tiny_tokens
from tests.warm_python import WarmPython

ROOT = Path(__file__).parents[2]

LOAD = """
import sys, json, torch
{imports}
from transformers import AutoModelForCausalLM
for folder in json.loads(sys.argv[1]):
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    except Exception as problem:
        print("refused", type(problem).__name__)
        continue
    ids = torch.load(folder + "/ids.pt")
    with torch.no_grad():
        torch.save(model(ids).logits, folder + "/logits.pt")
        torch.save(model.generate(ids[:1, :6], max_new_tokens=6, min_new_tokens=6, do_sample=False), folder + "/new.pt")
    print("loaded")
"""

CASES = {
    "floats of four bits": ("llama_gqa", "[{rtn: {scheme: nf4_g32, overrides: {'*.up_proj': {scheme: fp4_channel}}}}]"),
    "two levels of scales": ("qwen3", "[{rtn: {scheme: nvfp4, on_indivisible: pad}}]"),
    "rounded inputs": ("llama", "[{rtn: {scheme: nvfp4_a, overrides: {'*.up_proj': {scheme: fp8e5m2_g32_a8tensor}}}}]"),
    "powers of two in float32": ("llama", "[{gptq: {scheme: mxfp4_a}}]"),
    "one table for embedding and head": ("gemma2", "[{embeddings: {embedding: nvfp4, head: nvfp4}}]"),
    "tables of their own": ("llama_gqa", "[{embeddings: {embedding: int5_g32, head: mxfp8_a, tied: untie}}]"),
    "embedding alone": ("gpt2", "[{embeddings: {embedding: fp8_tensor, head: null, tied: untie}}]"),
    "codes and a table": (
        "opt",
        "[{awq: {scheme: int3_g32}}, {embeddings: {embedding: int6_channel, head: int6_channel}}]",
    ),
    "factors": ("llama_gqa", "[{svd: {fraction: 0.2}}]"),
    "factors of a Conv1D": ("gpt2", "[{svd: {fraction: 0.2}}]"),
    "factors with a bias": ("opt", "[{svd: {fraction: 0.2}}]"),
    "quantized low-rank factors": (
        "qwen3",
        "[{svd: {fraction: 0.2}}, {gptq: {scheme: int3_g16_asym, on_indivisible: pad}}]",
    ),
    "codes, factors and dense": (
        "gemma2",
        "[{svd: {fraction: 0.2, sites: '*.down_proj'}}, {rtn: {scheme: int4_channel, sites: '*.gate_proj'}}]",
    ),
    "codes with a branch of codes": (
        "opt",
        "[{caldera: {scheme: int2_g16, rank: 3, iterations: 1, factor_scheme: int4_g8, sites: '*.0.*'}}]",
    ),
    "codes of a Conv1D with a branch": (
        "gpt2",
        "[{low_rank_correction: {quantizer: {rtn: {scheme: int2_g16}}, rank: 3}}]",
    ),
}


def compressed(family: str, passes: str) -> Any:
    model = tiny_model(family, seed=1)
    windows = torch.randint(3, 100, (6, 24), generator=torch.Generator().manual_seed(0))
    return apply_passes(
        model,
        map_of(model),
        parse_recipe(f"passes: {passes}", "test").passes,
        RunContext(windows, batch=4),
    ).model


def map_of(model: Any) -> ModelMap:
    return map_model(model)


def in_fresh_process(python: WarmPython, folders: list[Path], imports: str) -> list[str]:
    names = json.dumps([str(folder) for folder in folders])
    return said(python.run(LOAD.format(imports=imports), names, imports_us=bool(imports)))


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if line.startswith(("loaded", "refused"))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("manifest")
    folders = {}
    for number, (name, (family, passes)) in enumerate(CASES.items()):
        model = compressed(family, passes)
        folder = root / str(number)
        save_model(model, folder, "auto", storage_dtype=torch.float32, max_shard_size="5GB")
        ids = tiny_tokens(family)
        torch.save(ids, folder / "ids.pt")
        with torch.no_grad():
            torch.save(model(ids).logits, root / f"{number}.pt")
        folders[name] = folder
    return folders


def test_a_process_that_only_imported_us_computes_the_same_logits(
    saved: dict[str, Path], stock_python: WarmPython
) -> None:
    assert in_fresh_process(stock_python, list(saved.values()), "import llmcompress") == ["loaded"] * len(saved)
    for name, folder in saved.items():
        assert torch.equal(torch.load(folder / "logits.pt"), torch.load(folder.with_suffix(".pt"))), name
        assert torch.load(folder / "new.pt").shape == (1, 12), name


def test_a_plain_loader_refuses_loudly(saved: dict[str, Path], stock_python: WarmPython) -> None:
    assert in_fresh_process(stock_python, list(saved.values()), "") == ["refused RuntimeError"] * len(saved)


def test_we_may_be_imported_before_the_libraries_too(saved: dict[str, Path]) -> None:
    """The one process here that imports everything for itself: the others have stock libraries from their start."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(imports="import llmcompress"), json.dumps([str(saved["factors"])])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert said(done) == ["loaded"]


def test_codes_take_their_own_bits_on_disk(saved: dict[str, Path]) -> None:
    from safetensors import safe_open

    with safe_open(saved["quantized low-rank factors"] / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.endswith("q_proj.right.weight")]  # noqa: SIM118
        packed = file.get_tensor(names[0])
    assert packed.dtype == torch.uint8 and packed.shape[1] == 64 * 3 // 8


@pytest.mark.parametrize("scheme", ["int3_g32", "int5_channel", "int4_g32_asym"])
def test_what_stock_formats_widen_keeps_its_own_bits_on_request(
    scheme: str, tmp_path: Path, stock_python: WarmPython
) -> None:
    model, ids = compressed("llama", f"[{{rtn: {{scheme: {scheme}}}}}]"), tiny_tokens("llama")
    sizes = {}
    for name in ("auto", "llmcompress"):
        save_model(model, tmp_path / name, name, storage_dtype=torch.float32, max_shard_size="5GB")
        sizes[name] = (tmp_path / name / "model.safetensors").stat().st_size
    assert sizes["llmcompress"] < sizes["auto"]
    torch.save(ids, tmp_path / "llmcompress" / "ids.pt")
    assert in_fresh_process(stock_python, [tmp_path / "llmcompress"], "import llmcompress") == ["loaded"]
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "llmcompress" / "logits.pt"), model(ids).logits)
    assert in_fresh_process(stock_python, [tmp_path / "llmcompress"], "") == ["refused RuntimeError"]


def test_plain_multiplies_everything_out(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for family in ("llama_gqa", "gpt2"):
        model = compressed(family, "[{svd: {fraction: 0.2}}]")
        save_model(model, tmp_path / family, "plain", storage_dtype=torch.float32, max_shard_size="5GB")
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float32).eval()
        ids = tiny_tokens(family)
        with torch.no_grad():
            assert torch.allclose(stock(ids).logits, model(ids).logits, atol=2e-5)


def test_compressed_tensors_is_refused_for_what_it_has_no_words_for(tmp_path: Path) -> None:
    with pytest.raises(CompressError) as refused:
        save_model(
            compressed("llama", "[{svd: {fraction: 0.2}}]"),
            tmp_path,
            "compressed-tensors",
            storage_dtype=torch.float32,
            max_shard_size="5GB",
        )
    assert refused.value.code == "save.format" and "auto" in refused.value.fix


def test_other_shapes_and_numbers_are_described_and_made_again() -> None:
    model = tiny_model("llama", seed=1)
    _, block = find_blocks(model)[1]
    down, up, gate = (block.get_submodule(f"mlp.{name}_proj") for name in ("down", "up", "gate"))
    for linear in (up, gate):
        linear.weight, linear.out_features = nn.Parameter(linear.weight[:50].clone()), 50
    down.weight, down.in_features = nn.Parameter(down.weight[:, :50].clone()), 50
    found = changes(model, stock_model(model))
    assert not found.modules and len(found.shapes) == 3 and len(found.attributes) == 3
    again = stock_model(model)
    apply_manifest(again, Manifest.from_json(json.loads(json.dumps(found.to_json()))), torch.float32)
    again.load_state_dict(model.state_dict(), assign=True)
    ids = tiny_tokens("llama")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert not changes(model, again)


def test_an_unknown_module_is_an_error_not_a_wrong_folder() -> None:
    model = tiny_model("llama", seed=1)
    find_blocks(model)[0][1].mlp = nn.Identity()
    with pytest.raises(CompressError, match=r"manifest\.unknown-module"):
        changes(model, stock_model(model))
