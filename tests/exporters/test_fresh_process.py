"""The promise of both formats: stock transformers in a fresh process computes the logits of the live model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmcompress.exporters.save import save_model
from tests.exporters.quantized import load_in_fresh_process, logits, quantize_head, quantized_model
from tests.families import tiny_tokens


@dataclass(frozen=True)
class Case:
    family: str
    schemes: tuple[str, ...]
    storage: torch.dtype = torch.bfloat16
    plain: bool = False
    exact: tuple[str, ...] = ("auto", "float32")
    """Dtypes for which the logits are equal bit for bit; others within rounding of the weights to bfloat16."""
    config: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ("auto", "float32")
    """Dtypes that stock loaders can be asked for."""
    head: str | None = None
    """Scheme of the head."""


def _weight_only() -> dict[str, Case]:
    sizes = ("channel", "g32", "channel_asym", "g32_asym")
    return {f"int{bits}_{size}": Case("llama", (f"int{bits}_{size}",)) for bits in (2, 3, 4, 8) for size in sizes}


# rounded to bfloat16 when multiplied out, so a float32 loader sees the rounding
DENSE = ("auto",)

# its decompressor knows bfloat16 alone, and another dtype fails loudly
BFLOAT16 = ("auto",)

CASES = {
    **_weight_only(),
    "wide integers": Case("llama", ("int5_g32", "int6_channel", "int7_g32_asym", "int6_g32_a8token")),
    "fp8": Case("llama", ("fp8_channel", "fp8_g32", "fp8_tensor")),
    "fp8, rounded inputs": Case("llama", ("fp8_channel_a8token", "fp8_tensor_a8tensor", "fp8_g32_a8token")),
    "fp8, flat inputs": Case("opt", ("fp8_channel_a8token",)),
    "fp8 of falcon": Case("falcon", ("fp8_channel",)),
    "mxfp4": Case("llama", ("mxfp4",), dtypes=BFLOAT16),
    "mx with rounded inputs": Case("llama", ("mxfp8_a", "mxfp4_a"), dtypes=BFLOAT16),
    "nvfp4 and others": Case("llama", ("nvfp4", "int4_g32", "mxfp8", "fp8_channel"), dtypes=BFLOAT16),
    "mxfp4 of falcon": Case("falcon", ("mxfp4",), exact=DENSE),
    "head": Case("llama", ("int4_g32",), head="int8_channel"),
    "tied head": Case("llama_gqa", ("fp8_channel",), head="int4_g32"),
    "wider group than the row": Case("llama_gqa", ("int4_g128",)),
    "per token": Case("llama_gqa", ("int8_channel_a8token",)),
    "per token, asymmetric": Case("qwen3", ("int8_channel_asym_a8token",)),
    "per token, 4 bits": Case("mistral", ("int4_g32_a8token",)),
    "static": Case("llama", ("int8_channel_a8tensor",)),
    "per token, flat inputs": Case("opt", ("int8_channel_a8token",)),
    "mixed": Case("llama", ("int4_g32", "int8_channel", "int3_g32_asym", "int8_channel_a8token")),
    "opt": Case("opt", ("int4_g32",)),
    "falcon": Case("falcon", ("int4_g32", "int3_g32_asym")),
    # its linears round once more before they add the bias
    "falcon with biases": Case("falcon_old", ("int4_g32",), exact=("float32",)),
    "bloom": Case("bloom", ("int8_channel",)),
    "float32 storage": Case("llama", ("int4_g32",), storage=torch.float32),
    "ragged": Case("llama_odd", ("int4_g32",), exact=DENSE),
    "ragged and not": Case("phi3", ("int4_g40", "int4_g32"), exact=DENSE),
    "gpt2": Case("gpt2", ("int4_g32",), exact=DENSE),
    "mixtral": Case("mixtral", ("int4_g32",), exact=DENSE),
    "qwen3_moe": Case("qwen3_moe", ("int4_g32",), exact=DENSE),
    "plain llama": Case("llama_gqa", ("int4_g32",), plain=True, exact=DENSE),
    "plain gpt2": Case("gpt2", ("int3_g32_asym",), plain=True, exact=DENSE),
    "plain opt": Case("opt", ("int4_g32",), plain=True, exact=DENSE),
    "plain qwen3_moe": Case("qwen3_moe", ("int4_g32",), plain=True, exact=DENSE),
    "plain float32": Case("gpt2", ("int4_g32",), storage=torch.float32, plain=True),
}
if transformers.__version__.startswith("4."):
    # here experts are linears like all others, seen by the model as tokens × channels
    CASES["experts, per token"] = Case("qwen3_moe", ("int8_channel_a8token",))
    CASES["mixtral"] = Case("mixtral", ("int4_g32",))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, stock_python) -> tuple[dict[str, Path], dict[str, list[str]]]:
    root = tmp_path_factory.mktemp("saved")
    folders = {name: root / str(number) for number, name in enumerate(CASES)}
    for name, case in CASES.items():
        model = quantized_model(case.family, case.schemes, **case.config)
        if case.head:
            quantize_head(model, case.head)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        wanted, shard = ("plain", "60KB") if case.plain else ("auto", "5GB")
        saved = save_model(model, folders[name], wanted, storage_dtype=case.storage, max_shard_size=shard)
        assert saved.format != "llmcompress", "a stock format holds it"
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        ids = tiny_tokens(case.family)
        expected = {"float32": logits(model, ids, torch.float32), "auto": logits(model, ids, case.storage)}
        torch.save(expected, folders[name].with_suffix(".pt"))
    families = {name: case.family for name, case in CASES.items()}
    dtypes = {name: case.dtypes for name, case in CASES.items()}
    return folders, load_in_fresh_process(stock_python, folders, families, dtypes)


@pytest.mark.parametrize("name", CASES)
def test_fresh_process_computes_the_same_logits(loaded, name):
    folder = loaded[0][name]
    expected = torch.load(folder.with_suffix(".pt"))
    for dtype in CASES[name].dtypes:
        found = torch.load(folder / f"{dtype}.pt")
        assert found.dtype == expected[dtype].dtype
        if dtype in CASES[name].exact:
            assert torch.equal(found, expected[dtype]), dtype
        else:
            assert (found.float() - expected[dtype].float()).abs().max() < 0.05


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_of_the_folder_is_used_and_none_is_missing(loaded, name):
    assert not any(loaded[1][f"{name} {dtype}"] for dtype in CASES[name].dtypes)


def test_the_loading_process_never_imported_us(loaded):
    assert not loaded[1]["llmcompress"]
