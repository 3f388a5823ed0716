"""Every quantizer rounds straight onto K-quants: what a module holds is what its file holds, and a mask is not lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from llmcompress import compress, export, load
from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError
from llmcompress.formats import gguf
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.modules.quant_linear import quantized_linears
from llmcompress.modules.trainable_roles import TrainableRoles
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES
from tests.exporters.gguf_models import tiny, tokenizer

QUANTIZERS: list[tuple[str, dict[str, Any]]] = [
    ("rtn", {"scheme": "q4_k", "range": "mse"}),
    ("gptq", {"scheme": "q3_k"}),
    ("gptq", {"scheme": "q2_k", "act_order": False, "range": "joint"}),
    ("awq", {"scheme": "q5_k"}),
    ("hqq", {"scheme": "q4_k"}),
    ("gsq", {"scheme": "q6_k", "steps": 3}),
    ("gsq", {"scheme": "q4_k", "steps": 3}),
    ("efficient_qat", {"scheme": "q4_k", "steps": 3}),
    ("learned_rounding", {"scheme": "q4_k", "steps": 3}),
    ("mixed_precision", {"schemes": ["q3_k", "q4_k", "q6_k"], "bits": 4.6, "samples": 2}),
]
WINDOWS = torch.randint(3, 280, (4, 16), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
_maps: list[ModelMap] = []


def model() -> Any:
    return tiny("llama", **SIZES)


def compressed(name: str, options: dict[str, Any], *before: Any) -> tuple[Any, list[Any]]:
    if not _maps:
        _maps.append(map_model(model()))
    context = RunContext(WINDOWS, batch=4, storage_dtype=torch.bfloat16)
    return apply_passes(model(), _maps[0], [*before, PASSES[name](**options)], context)


@pytest.mark.parametrize(("name", "options"), QUANTIZERS, ids=str)
def test_a_module_computes_with_the_weights_of_its_file(name: str, options: dict[str, Any]) -> None:
    found, rows = compressed(name, options)
    linears = quantized_linears(found)
    assert len(linears) == len(rows) == 7
    for row in rows:
        site = linears[row.site]
        kind = gguf.block_type(site.scheme.weights, site.in_features)
        assert kind is not None and kind.name.lower() == row.scheme == site.scheme.name
        packed_OC = gguf.pack(site.quantized, kind)
        assert torch.equal(gguf.unpack(packed_OC, kind).dense(), site.dense_weight())
        assert row.bits_per_weight == kind.bits_per_weight == site.coded_bits() / site.coded_weights()
        assert row.error is None or row.error <= (row.error_before or row.error)


@pytest.mark.parametrize("scheme", ["q2_k", "q4_k", "q6_k"])
def test_a_trainable_twin_computes_the_same_and_leaves_weights_of_the_grid(scheme: str) -> None:
    found, _ = compressed("rtn", {"scheme": scheme})
    site = quantized_linears(found)["model.layers.0.mlp.down_proj"]
    roles = frozenset({"weights", "scales", "zero_points"})
    twin = site.trainable(TrainableRoles(roles, keep_zeros=False, storage_dtype=torch.bfloat16))
    assert torch.equal(twin.dense_weight(), site.dense_weight())
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3)
    x_TI = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        twin(x_TI).square().sum().backward()
        optimizer.step()
    again = twin.compressed()
    assert torch.equal(again.dense_weight(), twin.dense_weight().detach())
    assert not torch.equal(again.dense_weight(), site.dense_weight())


def test_a_mask_is_not_lost_in_a_grid_without_zero() -> None:
    recipe = {"passes": [{"magnitude": {"sparsity": 0.5}}, {"rtn": {"scheme": "q4_k"}}]}
    with pytest.raises(CompressError, match="no exact zero"):
        compress(model(), recipe, tokenizer=tokenizer())
    with pytest.raises(ValidationError, match="no exact zero"):
        PASSES["sparsegpt"](sparsity=0.5, scheme="q4_k")
    found, _ = compressed("rtn", {"scheme": "q3_k"}, PASSES["magnitude"](sparsity=0.5))
    for site in quantized_linears(found).values():
        assert float((site.dense_weight() == 0).float().mean()) >= 0.5


def test_rows_that_are_no_super_blocks_are_refused_with_what_llama_cpp_takes() -> None:
    small = tiny("llama", hidden_size=64, intermediate_size=512)
    with pytest.raises(CompressError, match="super-blocks of 256") as told:
        PASSES["gptq"](scheme="q4_k", on_indivisible="pad").check(map_model(small))
    assert "int5_g32" in (told.value.fix or "")
    fitted = PASSES["gptq"](scheme="q6_k", on_indivisible="fit")
    assert fitted.scheme_for("x", 64).name == "int8_g32" and fitted.scheme_for("x", 512).name == "q6_k"


@torch.no_grad()
def test_our_own_format_and_ordinary_weights_hold_them(tmp_path: Path) -> None:
    found, _ = compressed("rtn", {"scheme": "q4_k"})
    wanted = found(WINDOWS).logits
    made = export(found, ["llmcompress", "plain"], tmp_path, tokenizer=tokenizer(), run=False)
    assert not any(report.differing for report in made.values())
    again = load(str(tmp_path / "llmcompress"), dtype=torch.float32).model
    assert torch.equal(again(WINDOWS).logits, wanted)
    coded = sum(site.coded_bits() // 8 for site in quantized_linears(found).values())
    dense = 4 * sum(parameter.numel() for parameter in found.parameters())
    assert made["llmcompress"].bytes == pytest.approx(coded + dense, rel=0.02)
    plain = load(str(tmp_path / "plain"), dtype=torch.float32).model
    torch.testing.assert_close(plain(WINDOWS).logits, wanted, rtol=0, atol=1e-5)
