"""Methods compose and reload in stock transformers; an order that undoes work is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llmcompress import CompressError, Report, compress, load
from llmcompress.recipe import Recipe, parse_recipe
from tests.tiny_folder import write_tiny_llama
from tests.warm_python import Done, WarmPython

BEFORE = """
calibration: {samples: 6, tokens: 48, batch: 4}
evaluate: {perplexity: [{source: 'builtin:evaluation', window: 48, max_windows: 2}]}
"""

STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
assert "llmcompress" not in sys.modules
ids = torch.arange(3, 27).reshape(2, 12)
with torch.no_grad():
    whole = model(ids, use_cache=False).logits
    start = model(ids[:, :7], use_cache=True)
    rest = model(ids[:, 7:], past_key_values=start.past_key_values, use_cache=True).logits
assert torch.allclose(rest, whole[:, 7:], atol=1e-4), "a cached forward computes something else"
model.generate(ids[:1, :5], max_new_tokens=6, do_sample=False)
torch.save(whole, sys.argv[1] + "/logits.pt")
"""

PLAIN = {
    "prune, refit, quantize": (
        "[{width: {fraction: 0.25, score: activation, refit: columns}}, {gptq: {scheme: int4_g16}}]"
    ),
    "drop, prune, quantize": (
        "[{depth: {count: 1}}, {width: {fraction: 0.25, score: l2, heads: false}}, {rtn: {scheme: int4_g16}}]"
    ),
    "slice, then sparse": "[{slicegpt: {fraction: 0.25, round_to: 16}}, {wanda: {pattern: '2:4'}}]",
    "slice, then quantize": "[{slicegpt: {fraction: 0.25, round_to: 16}}, {awq: {scheme: int4_g16}}]",
    "sparse, narrower, smooth, 8 bits": (
        "[{sparsegpt: {sparsity: 0.5}}, {width: {fraction: 0.25, score: activation, refit: none}}, smoothquant,"
        " {gptq: {scheme: int8_channel}}]"
    ),
}
"""All end in a folder that needs nothing of ours."""

MANIFEST = {
    "factors, then codes": "[{svd: {fraction: 0.3}}, {gptq: {scheme: int4_g16, on_indivisible: pad}}]",
    "narrower, then factors": "[{width: {fraction: 0.25, score: l2}}, {svd: {fraction: 0.3}}]",
    "widths that differ from block to block, then codes": (
        "[{width: {fraction: 0.3, score: activation, allocation: global, floor: 0.1}},"
        " {gptq: {scheme: int4_g16, on_indivisible: channel}}]"
    ),
    "fewer blocks, factors": "[{depth: {count: 1}}, {svd: {fraction: 0.3, ranks: energy}}]",
}
"""These load after `import llmcompress`."""

REFUSED = {
    "[wanda, svd]": "zeros",
    "[{wanda: {pattern: '2:4'}}, {width: {fraction: 0.25}}]": "",
    "[wanda, slicegpt]": "",
    "[gptq, wanda]": "quantized",
    "[gptq, svd]": "quantized",
    "[rtn, {width: {fraction: 0.25}}]": "quantized",
    "[svd, svd]": "factor",
    "[{sparsegpt: {scheme: int4_g16}}, gptq]": "quantized",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3}
    return write_tiny_llama(folder, tie_word_embeddings=True, **sizes)


def recipe(passes: str) -> Recipe:
    return parse_recipe(f"{BEFORE}passes: {passes}\n", "test")


def run(passes: str, tiny: Path, output: Path) -> Report:
    return compress(str(tiny), recipe(passes), output).report


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model, _ = load(folder, dtype=torch.float32)
    return model(torch.arange(3, 27).reshape(2, 12), use_cache=False).logits


def in_stock_process(python: WarmPython, folder: Path, *, imports: str = "") -> Done:
    program = STOCK if not imports else imports + "\n" + STOCK.replace('assert "llmcompress" not in sys.modules\n', "")
    return python.run(program, folder, imports_us=bool(imports))


@pytest.mark.parametrize("name", PLAIN)
def test_what_a_plain_config_can_say_loads_in_stock_transformers(
    name: str, tiny: Path, tmp_path: Path, stock_python: WarmPython
) -> None:
    report = run(PLAIN[name], tiny, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("quantization_config", {}).get("quant_method", "compressed-tensors") == "compressed-tensors"
    assert report.bytes_compressed < report.bytes_dense
    done = in_stock_process(stock_python, tmp_path / "out")
    assert done.returncode == 0, done.stderr[-1500:]
    assert torch.allclose(torch.load(tmp_path / "out" / "logits.pt"), logits(tmp_path / "out"), atol=1e-4)


@pytest.mark.parametrize("name", MANIFEST)
def test_what_it_cannot_say_loads_after_importing_us_and_not_before(
    name: str, tiny: Path, tmp_path: Path, stock_python: WarmPython
) -> None:
    run(MANIFEST[name], tiny, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "llmcompress"
    plain = in_stock_process(stock_python, tmp_path / "out")
    assert plain.returncode != 0
    assert "ignore_mismatched_sizes" in plain.stderr or "size mismatch" in plain.stderr
    done = in_stock_process(stock_python, tmp_path / "out", imports="import llmcompress")
    assert done.returncode == 0, done.stderr[-1500:]
    assert torch.allclose(torch.load(tmp_path / "out" / "logits.pt"), logits(tmp_path / "out"), atol=1e-4)


@pytest.mark.parametrize("passes", REFUSED)
def test_an_order_that_undoes_work_is_refused_with_the_reason(passes: str) -> None:
    with pytest.raises(CompressError) as refused:
        recipe(passes)
    assert refused.value.code == "recipe.order"
    assert REFUSED[passes] in refused.value.what and "cannot follow" in refused.value.what and refused.value.fix


def test_two_of_four_stay_zero_through_smoothing_and_rounding(tiny: Path, tmp_path: Path) -> None:
    run(
        "[{sparsegpt: {pattern: '2:4'}}, {awq: {scheme: int4_g16, round: false}}, {gptq: {scheme: int4_g16}}]",
        tiny,
        tmp_path / "out",
    )
    model, _ = load(tmp_path / "out", dtype=torch.float32)
    model(torch.arange(3, 9)[None])
    found = {name: part for name, part in model.named_modules() if name.endswith("_proj")}
    assert len(found) == 21
    for name, part in found.items():
        groups = part.weight.reshape(-1, 4)
        assert ((groups == 0).sum(1) >= 2).all(), name


def test_bytes_of_the_report_are_the_bytes_of_the_tensors(tiny: Path, tmp_path: Path) -> None:
    report = run(PLAIN["prune, refit, quantize"], tiny, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    assert report.bytes_compressed == file.stat().st_size
    with safe_open(file, framework="pt") as tensors:
        assert "model.layers.2.mlp.down_proj.weight_packed" in tensors.keys()  # noqa: SIM118
