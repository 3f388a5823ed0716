"""What rotation, outlier suppression and reordering leave is saved and computes the same in a fresh process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.errors import CompressError
from llmcompress.exporters.save import save_model
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.transformed_input import TransformedInput
from tests.families import tiny_model
from tests.passes.quantization.rearranged import compressed, distance, logits, windows
from tests.warm_python import WarmPython

STOCK = {
    "rotation, gptq": ("llama_gqa", "[rotation, {gptq: {scheme: int8_channel}}]"),
    "rotation of a tied model": ("qwen2", "[rotation]"),
    "rotation, W8A8": ("opt", "[rotation, {rtn: {scheme: int8_channel_a8token}}]"),
    "outlier suppression, gptq W8A8": (
        "opt",
        "[{outlier_suppression: {points: 5}}, {gptq: {scheme: int8_channel_a8tensor}}]",
    ),
    "pruned, outlier suppression, W8A8": (
        "llama_gqa",
        "[{width: {fraction: 0.25, score: l2}}, {outlier_suppression: {points: 5}},"
        " {rtn: {scheme: int8_channel_a8token}}]",
    ),
}
"""These need nothing of ours."""

OURS = {
    "online, codes": ("llama_gqa", "[{rotation: {online: true}}, {gptq: {scheme: int4_channel_a8token}}]"),
    "online, codes of a Conv1D": ("gpt2", "[{rotation: {online: true}}, {rtn: {scheme: int8_channel}}]"),
    "narrower, online": (
        "llama_odd",
        "[{width: {fraction: 0.2, score: l2, heads: false}}, {rotation: {online: true}}]",
    ),
    "reordered": ("gpt2", "[{reorder: {clusters: 5, bits: 8}}]"),
    "reordered, codes": ("llama_gqa", "[{reorder: {clusters: 8, bits: 4}}, {gptq: {scheme: int4_channel}}]"),
    "pruned, reordered, codes": (
        "opt",
        "[{width: {fraction: 0.25, score: l2}}, {reorder: {clusters: 4}}, {rtn: {scheme: int8_channel}}]",
    ),
}
"""These load after `import llmcompress`, and a plain loader refuses them."""

LOADER = """
import json, sys, torch, transformers
{imports}
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
for folder in json.loads(sys.argv[1]):
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    except Exception as error:
        print("refused", type(error).__name__)
        continue
    ids = torch.load(folder + "/ids.pt")
    with torch.no_grad():
        torch.save(model(ids).logits, folder + "/logits.pt")
    model.generate(ids[:1, :5], max_new_tokens=4, do_sample=False)
    print("loaded")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    root, found = tmp_path_factory.mktemp("rearranged"), {}
    for number, (name, (family, passes)) in enumerate({**STOCK, **OURS}.items()):
        model, _ = compressed(family, passes)
        folder = root / str(number)
        written = save_model(model, folder, "auto", storage_dtype=torch.float32, max_shard_size="5GB")
        assert (written.format == "llmcompress") == (name in OURS), name
        torch.save(windows(2, 16, seed=9), folder / "ids.pt")
        found[name] = (folder, model)
    return found


def loaded(python: WarmPython, folders: list[Path], imports: str) -> list[str]:
    names = json.dumps([str(folder) for folder in folders])
    done = python.run(LOADER.format(imports=imports), names, imports_us=bool(imports))
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if line.startswith(("loaded", "refused"))]


def test_stock_transformers_loads_what_needs_nothing_and_refuses_the_rest(
    saved: dict[str, tuple[Path, Any]], stock_python: WarmPython
) -> None:
    said = loaded(stock_python, [folder for folder, _ in saved.values()], "")
    assert dict(zip(saved, said, strict=True)) == {
        **dict.fromkeys(STOCK, "loaded"),
        **dict.fromkeys(OURS, "refused RuntimeError"),
    }
    for name in STOCK:
        folder, model = saved[name]
        near = 1e-4 * float(logits(model).abs().max())
        torch.testing.assert_close(torch.load(folder / "logits.pt"), logits(model), rtol=0, atol=near, msg=name)


def test_with_us_the_rest_computes_the_same(saved: dict[str, tuple[Path, Any]], stock_python: WarmPython) -> None:
    assert loaded(stock_python, [saved[name][0] for name in OURS], "import llmcompress") == ["loaded"] * len(OURS)
    for name in OURS:
        folder, model = saved[name]
        assert torch.equal(torch.load(folder / "logits.pt"), logits(model)), name


def test_codes_stand_behind_what_happens_to_their_inputs(saved: dict[str, tuple[Path, Any]]) -> None:
    for name in OURS:
        before = [part for part in saved[name][1].modules() if isinstance(part, TransformedInput)]
        assert before, name
        assert all(isinstance(part.kept, QuantLinear) == ("codes" in name) for part in before), name


def test_eight_bits_after_each_of_them_stay_near_the_dense_model() -> None:
    seen = windows()
    for family, passes, near in (
        ("llama_gqa", "[rotation, {gptq: {scheme: int8_channel}}]", 0.02),
        ("gpt2", "[{outlier_suppression: {points: 5}}, {gptq: {scheme: int8_channel_a8token}}]", 0.03),
        ("opt", "[{reorder: {clusters: 16, bits: 8}}, {gptq: {scheme: int8_channel}}]", 0.05),
    ):
        model, _ = compressed(family, passes)
        assert distance(model, tiny_model(family, seed=1), seen) < near, family


def test_plain_multiplies_out_what_keeps_its_inputs_and_refuses_what_rounds_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for family, passes in (("llama_gqa", "[{rotation: {online: true}}]"), ("gpt2", "[{reorder: {bits: null}}]")):
        model, _ = compressed(family, passes)
        save_model(model, tmp_path / family, "plain", storage_dtype=torch.float32, max_shard_size="5GB")
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float32).eval()
        torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-4 * float(logits(model).abs().max()))
    model, _ = compressed("gpt2", "[reorder]")
    with pytest.raises(CompressError, match="quantizes activations"):
        save_model(model, tmp_path / "rounded", "plain", storage_dtype=torch.float32, max_shard_size="5GB")
