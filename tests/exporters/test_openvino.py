"""OpenVINO: our codes in its graph compute what the modules compute, stay compressed, and read back bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import openvino
import pytest
import torch
from torch import nn

from llmcompress import plan
from llmcompress.calibration.offloading import InMemory
from llmcompress.errors import CompressError
from llmcompress.exporters.base import Converted, Exact, Refused
from llmcompress.exporters.contents import CodedLinear, contents_in
from llmcompress.exporters.openvino import OpenVinoExporter
from llmcompress.exporters.openvino_form import why_not
from llmcompress.exporters.openvino_read_back import read_back
from llmcompress.exporters.openvino_request import GRAPH, GraphRequest
from llmcompress.exporters.openvino_surgery import replace_placeholders
from llmcompress.modules.corrected import CorrectedLinear
from llmcompress.modules.low_rank import LowRankLinear
from llmcompress.modules.quant_embedding import QuantEmbedding, SharedHead
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.scheme import named_scheme
from llmcompress.modules.selected import SelectedColumns, SelectedRows
from llmcompress.modules.transformed_input import RotatedInput
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.ranges import fit
from llmcompress.runners.openvino import EXACT
from tests.exporters.openvino_graphs import Sequence, placeholder_graph, request_of_sequence, write_sequence
from tests.families import tiny_model
from tests.tiny_folder import write_tiny_llama

IDS_BT = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
KEPT = {
    "int4_g32": "int4_t",
    "int4_g16_asym": "uint4_t",
    "int3_channel": "int4_t",
    "int2_g32_asym": "uint4_t",
    "ternary_g32": "int4_t",
    "int8_channel": "int8_t",
    "int6_g32_asym": "uint8_t",
    "int4_g48_positive": "int4_t",
    "nf4_g32": "nfloat4",
    "fp4_channel": "f4e2m1",
    "mxfp4": "f4e2m1",
    "nvfp4": "f4e2m1",
}
"""Scheme → what OpenVINO calls the weights of the product that it runs."""
EXPANDED = ["fp8_channel", "fp8_tensor", "fp8e5m2_g32", "mxfp8"]


def coded(name: str, outputs: int, inputs: int, *, bias: bool = False, seed: int = 0) -> QuantLinear:
    scheme, generator = named_scheme(name), torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
    fitted = fit(weight_OI, scheme.weights, scale_dtype=torch.bfloat16)
    bias_O = torch.randn(outputs, generator=generator) if bias else None
    scale = torch.tensor([0.03125]) if scheme.measures_inputs else None
    return QuantLinear.from_fitted(scheme, round_to_codes(weight_OI, fitted), fitted, bias_O, scale)


def table(name: str, entries: int, width: int) -> QuantEmbedding:
    weight_VD, scheme = torch.randn(entries, width, generator=torch.Generator().manual_seed(3)), named_scheme(name)
    fitted = fit(weight_VD, scheme.weights, scale_dtype=torch.bfloat16)
    return QuantEmbedding.of(scheme, round_to_codes(weight_VD, fitted), fitted, 1.0)


def embedding(width: int = 96) -> nn.Embedding:
    return nn.Embedding.from_pretrained(torch.randn(50, width, generator=torch.Generator().manual_seed(1)))


def computed(folder: Path) -> tuple[torch.Tensor, list[tuple[str, str, str]]]:
    """Logits, and of every product and look-up that ran: kind, implementation, type of its weights."""
    model = openvino.Core().compile_model(str(folder / f"{GRAPH}.xml"), "CPU", EXACT)
    given = {"input_ids": IDS_BT.numpy(), "beam_idx": torch.arange(2, dtype=torch.int32).numpy()}
    logits = torch.from_numpy(model(given)["logits"].copy())
    ran = []
    for node in model.get_runtime_model().get_ops():
        told = node.get_rt_info()
        kind = told["layerType"].astype(str)
        if kind in ("FullyConnected", "Gather"):
            weights = node.input(0 if kind == "Gather" else 1).get_source_output().get_element_type()
            ran.append((kind, told["primitiveType"].astype(str), str(weights)))
    return logits, ran


def check(model: Sequence, folder: Path) -> list[tuple[str, str, str]]:
    request = write_sequence(model, folder)
    logits, ran = computed(folder)
    wanted = model(IDS_BT)
    assert float((logits - wanted).abs().max()) < 2e-6 * float(wanted.abs().max()) + 1e-6
    rows = read_back(folder / f"{GRAPH}.xml", request, torch.float32)
    assert rows and all(row.is_same and row.weights_differing == 0 for row in rows)
    return ran


@pytest.mark.parametrize("name", [*KEPT, *EXPANDED])
def test_codes_compute_the_same_and_stay_compressed(name: str, tmp_path: Path) -> None:
    ran = check(Sequence(embedding(), block=coded(name, 64, 96, bias=True)), tmp_path)
    (weights,) = (kind for node, _, kind in ran if node == "FullyConnected")
    assert KEPT.get(name, "float32") in weights


def test_factors_branches_and_selections_are_products_sums_and_gathers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)

    def plain(outputs: int, inputs: int, *, bias: bool = False) -> nn.Linear:
        linear = nn.Linear(inputs, outputs, bias=bias)
        linear.weight.data = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
        return linear

    rows = plain(40, 64, bias=True)
    columns = plain(48, 32)
    model = Sequence(
        embedding(),
        factors=LowRankLinear(coded("int4_g32", 16, 96), plain(64, 16, bias=True)),
        branch=CorrectedLinear(coded("int4_g32", 64, 64, bias=True), plain(8, 64), coded("int8_channel", 64, 8)),
        rows=SelectedRows.from_rows(rows.weight, rows.bias, rows=range(5, 45), outputs=64),
        columns=SelectedColumns.from_columns(columns.weight, None, columns=range(3, 35), inputs=64),
        head=plain(50, 48),
    )
    ran = check(model, tmp_path)
    assert sum(kind == "FullyConnected" for kind, _, _ in ran) == 8


@pytest.mark.parametrize("name", ["int8_channel", "int8_g32", "int4_g32_asym"])
def test_a_tied_head_multiplies_by_the_table_of_the_embedding(name: str, tmp_path: Path) -> None:
    model = Sequence(table(name, 50, 96), block=coded("int4_g32", 96, 96), head=SharedHead("embedding", 50, 96, None))
    ran = check(model, tmp_path)
    assert [kind for kind, _, weights in sorted(ran) if "int" in weights] == [
        "FullyConnected",
        "FullyConnected",
        "Gather",
    ]
    codes = 50 * 96 * named_scheme(name).weights.bits // 8
    layers = (tmp_path / f"{GRAPH}.xml").read_text()
    assert layers.count(f'size="{codes}"') == 1, "one table"


def test_static_activations_run_in_the_kernel_of_8_bits(tmp_path: Path) -> None:
    model = Sequence(embedding(), block=coded("int8_channel_a8tensor", 64, 96, bias=True))
    ran = check(model, tmp_path)
    (kernel,) = (kernel for node, kernel, _ in ran if node == "FullyConnected")
    assert kernel.endswith("i8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ordinary_matrices_keep_the_stored_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Sequence(embedding(), block=nn.Linear(96, 96), head=nn.Linear(96, 50, bias=False))
    model.get_submodule("head").weight = model.embedding.weight
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    request = write_sequence(model, tmp_path, dtype)
    rows = read_back(tmp_path / f"{GRAPH}.xml", request, dtype)
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    assert [row.stored_as for row in rows] == [kind, kind, "f32"] and all(row.is_same for row in rows)
    torch.testing.assert_close(computed(tmp_path)[0], model(IDS_BT), rtol=0, atol=1e-4)


def test_a_changed_byte_and_a_changed_connection_are_found(tmp_path: Path) -> None:
    model = Sequence(embedding(), one=coded("int4_g32", 96, 96, bias=True), two=coded("int4_g32", 96, 96, seed=1))
    request = write_sequence(model, tmp_path)
    file = tmp_path / f"{GRAPH}.xml"
    weights, graph = file.with_suffix(".bin"), file.read_text()
    whole, start = bytearray(weights.read_bytes()), offset(graph, "one.weight/codes")
    whole[start] ^= 1
    weights.write_bytes(whole)
    assert [row.source for row in read_back(file, request, torch.float32) if not row.is_same] == ["one.weight"]
    whole[start] ^= 1
    weights.write_bytes(whole)
    swapped = graph.replace("one.weight", "#").replace("two.weight", "one.weight").replace("#", "two.weight")
    for changed in (swapped, graph.replace('type="MatMul"', 'type="Add"')):
        file.write_text(changed)
        found = [row.source for row in read_back(file, request, torch.float32) if not row.is_same]
        assert found == ["one.weight", "two.weight"]


def offset(graph: str, name: str) -> int:
    """Where the bytes of a constant begin."""
    (found,) = re.findall(rf'name="{name}".*?offset="(\d+)"', graph, re.DOTALL)[:1]
    return int(found)


def test_a_graph_of_another_model_is_not_filled(tmp_path: Path) -> None:
    model = Sequence(embedding(), one=coded("int4_g32", 96, 96), two=coded("int4_g32", 96, 96))
    request = request_of_sequence(model)
    for graph in (
        placeholder_graph(request, marks={**request.marks, "two": request.marks["one"]}),
        placeholder_graph(request_of_sequence(Sequence(embedding(), one=coded("int4_g32", 96, 96)))),  # has no `two`
    ):
        with pytest.raises(CompressError, match="does not read this module") as refused:
            replace_placeholders(graph, request, torch.float32, weights_at=InMemory())
        assert refused.value.where == "two"


def test_modules_at_the_same_place_of_other_blocks_share_a_mark() -> None:
    names = [f"layers.{block}.{leaf}" for block in range(2) for leaf in ("q", "k")]
    request = GraphRequest(nn.Module(), dict.fromkeys(names, (4, 4)), {})
    assert request.marks == {"layers.0.q": 1, "layers.0.k": 2, "layers.1.q": 1, "layers.1.k": 2}


@pytest.mark.parametrize(
    ("scheme", "inputs", "answer", "near"),
    [
        ("int4_g64", 128, Exact, None),
        ("int4_g48", 144, Exact, None),
        ("int8_channel_a8tensor", 64, Exact, None),
        ("int8_channel_a8token", 64, Converted, None),
        ("fp8_channel", 64, Converted, None),
        ("int4_g64", 96, Refused, "int4_g32"),
        ("fp8_channel_a8tensor", 64, Refused, "fp8_channel"),
        ("mxfp4_a", 64, Refused, "mxfp4"),
        ("nvfp4_a", 64, Refused, "nvfp4"),
        ("q4_k", 256, Refused, "int4_g32_asym"),
    ],
)
def test_what_it_answers_for_a_linear(scheme: str, inputs: int, answer: type, near: str | None) -> None:
    found = OpenVinoExporter().check(CodedLinear("x", named_scheme(scheme), 8, inputs), torch.bfloat16)
    assert isinstance(found, answer)
    if isinstance(found, Refused):
        assert found.nearest is not None and found.nearest.name == near
    if isinstance(found, Converted):
        assert found.keeps_codes and found.why


def test_what_the_graph_cannot_hold_is_refused_by_name_or_as_dense() -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.down_proj = RotatedInput(mlp.down_proj)
    contents = contents_in(model, torch.float32)
    assert OpenVinoExporter().problem(contents) == "model.layers.0.mlp.down_proj changes its input (Hadamard)"
    assert OpenVinoExporter(instead="dense").problem(contents) is None
    assert why_not(mlp.down_proj.expression()) is not None


def test_a_plan_refuses_what_it_cannot_hold_with_the_nearest_scheme(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "source")
    with pytest.raises(CompressError, match="openvino cannot represent this model") as refused:
        plan(str(source), {"passes": [{"rtn": {"scheme": "nvfp4_a"}}], "export": ["openvino"]})
    assert "nvfp4" in refused.value.fix
    found = plan(str(source), {"passes": [{"rtn": {"scheme": "int3_channel"}}], "export": ["openvino"]})
    assert any(note == "openvino: int3_channel: codes are stored as i4" for note in found.warnings)


def test_the_request_is_plain_data(tmp_path: Path) -> None:
    request = request_of_sequence(Sequence(embedding(), block=coded("int4_g32", 64, 96, bias=True)))
    request.write(tmp_path)
    found = json.loads((tmp_path / "request.json").read_text())
    assert found == {
        "matrices": {"embedding": {"shape": [50, 96], "mark": 1}, "block": {"shape": [64, 96], "mark": 2}},
        "attributes": {},
        "tokenizer": False,
    }
