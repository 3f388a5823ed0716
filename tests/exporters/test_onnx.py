"""ONNX without Optimum: every expression as nodes of ONNX Runtime, the files read back, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from llmcompress.calibration.offloading import InMemory
from llmcompress.exporters.base import Converted, Exact, Refused
from llmcompress.exporters.cache_widths import cache_problem
from llmcompress.exporters.contents import CodedLinear, Contents, contents_in
from llmcompress.exporters.onnx import OnnxExporter
from llmcompress.exporters.onnx_base import problem_of
from llmcompress.exporters.onnx_file import DATA, FILE, fill, read_back, tensors_of, write
from llmcompress.exporters.onnx_graph import Plan, plan_of
from llmcompress.exporters.onnx_graph_program import DOMAIN
from llmcompress.exporters.onnx_nodes import Nodes
from llmcompress.exporters.openvino import OpenVinoExporter
from llmcompress.modules.expression import Chain, Expression, Gather, InputTransform, Opaque, OutputPlaces, Sum, Tied
from llmcompress.modules.expression_leaves import Dense, Quantized
from llmcompress.modules.input_transforms import Hadamard, Selection, Threshold
from llmcompress.modules.quant_embedding import QuantEmbedding
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.quantized import QuantizedTensor
from llmcompress.numerics.ranges import fit
from tests.exporters.gguf_models import tiny, tiny_quantized
from tests.exporters.quantized import quantize

INPUTS = 48
X_BTI = torch.randn(2, 5, INPUTS, generator=torch.Generator().manual_seed(3))
IDS_BT = torch.tensor([[3, 0, 39], [7, 7, 1]])


def dense(outputs: int, inputs: int = INPUTS, *, bias: bool = True) -> Dense:
    generator = torch.Generator().manual_seed(outputs)
    weight_OI = torch.randn(outputs, inputs, generator=generator).to(torch.bfloat16).float()
    return Dense(weight_OI, bias=torch.arange(outputs).float() / 8 if bias else None)


def coded(name: str, outputs: int, inputs: int = INPUTS, *, bias: bool = True) -> Quantized:
    scheme, ordinary = named_scheme(name), dense(outputs, inputs, bias=bias)
    fitted = fit(ordinary.weight, scheme.weights, scale_dtype=torch.bfloat16)
    tensor = QuantizedTensor.of(round_to_codes(ordinary.weight, fitted), fitted)
    fixed = torch.tensor([0.03125]) if scheme.activations == "tensor" else None
    return Quantized(tensor, scheme.activations, fixed, bias=ordinary.bias)


class Filled:
    """Expressions as files: every one between an input and an output of its own."""

    options: Any = None

    def __init__(self, holes: dict[str, Expression], folder: Path) -> None:
        self.folder, self.plan = folder, Plan({"vocab_size": 40}, holes, {}, {})
        self.nodes = Nodes(torch.bfloat16, accuracy_level=0, tied=self.plan.tied)
        self.proto = with_holes(holes)
        fill(self.proto, self.plan, self.nodes)
        self.nodes = tensors_of(self.plan, self.nodes, nn.Module())
        self.size = write(self.proto, self.nodes, folder, nn.Module(), InMemory())

    def run(self) -> dict[str, Tensor]:
        session = onnxruntime.InferenceSession(
            str(self.folder / FILE), self.options, providers=["CPUExecutionProvider"]
        )
        fed = {each.name: (IDS_BT if each.type == "tensor(int64)" else X_BTI).numpy() for each in session.get_inputs()}
        names = [each.name for each in session.get_outputs()]
        return dict(zip(names, map(torch.from_numpy, session.run(names, fed)), strict=True))


def with_holes(holes: dict[str, Expression]) -> Any:
    inputs = [
        helper.make_tensor_value_info(
            f"{name}.in", TensorProto.INT64 if isinstance(form, Gather) else TensorProto.FLOAT, None
        )
        for name, form in holes.items()
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in holes]
    nodes = [helper.make_node("Hole", [f"{name}.in"], [name], domain=DOMAIN, module=name) for name in holes]
    domains = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(helper.make_graph(nodes, "holes", inputs, outputs), opset_imports=domains, ir_version=9)


TABLE = coded("int8_channel", 40, bias=False)
FORMS: dict[str, Expression] = {
    "dense": dense(24),
    "int4": coded("int4_g32", 24),
    "int3 with zero points": coded("int3_g16_asym", 24),
    "rows of one scale": coded("int8_channel", 24, bias=False),
    "a token at a time": coded("int8_channel_a8token", 24),
    "calibrated": coded("int4_channel_a8tensor", 24),
    "no operator": coded("nf4_g16", 24),
    "low rank": Chain((coded("int4_g16", 16, bias=False), dense(24, 16))),
    "codes and a correction": Sum((coded("int4_g16", 24), Chain((dense(8, bias=False), dense(24, 8, bias=False))))),
    "selected": InputTransform(Selection(torch.tensor([5, 1, 40]), INPUTS), dense(24, 3)),
    "permuted": InputTransform(Selection(torch.arange(INPUTS).flip(0), INPUTS), coded("int4_g16", 24)),
    "turned": InputTransform(Hadamard(16), coded("int4_g16", 24)),
    "places": OutputPlaces(coded("int4_g16", 3), torch.tensor([7, 0, 2]), 24),
    "rows": Gather(dense(40, bias=False), 2.0),
    "rows of codes": Gather(TABLE, 0.5),
    "rows with zero points": Gather(coded("int4_g16_asym", 40, bias=False)),
    "head": Tied("rows of codes", TABLE),
    "dense head": Tied("rows", dense(40, bias=False)),
}


def test_nodes_compute_what_expressions_compute_and_files_hold_them(tmp_path: Path) -> None:
    filled = Filled(FORMS, tmp_path)
    found = filled.run()
    for name, form in FORMS.items():
        wanted = form(IDS_BT if isinstance(form, Gather) else X_BTI)
        torch.testing.assert_close(
            found[name], wanted, rtol=1e-5, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    rows = {row.source: row for row in read_back(tmp_path, filled.nodes)}
    assert all(row.is_same for row in rows.values())
    assert rows["int4"].codes_differing == 0 and rows["int4"].stored_as == "4 bits, blocks of 32"
    assert rows["a token at a time"].stored_as == "int8" and rows["rows of codes"].stored_as == "8 bits, blocks of 16"
    assert "head" not in rows and "dense head.weight" not in rows  # they read the tables of the embeddings


def test_a_byte_that_changed_is_noticed(tmp_path: Path) -> None:
    filled = Filled({"one": coded("int4_g16", 96), "other": dense(96)}, tmp_path)
    file = tmp_path / DATA
    for name, what in (("one.codes", "codes_differing"), ("other.weight", "weights_differing")):
        held = next(each for each in filled.proto.graph.initializer if each.name == name)
        offset = next(int(each.value) for each in held.external_data if each.key == "offset")
        content = bytearray(file.read_bytes())
        content[offset + 5] ^= 0x10
        file.write_bytes(content)
        (row,) = [row for row in read_back(tmp_path, filled.nodes) if not row.is_same]
        assert getattr(row, what) == 1 and row.source in name
        content[offset + 5] ^= 0x10
        file.write_bytes(content)
    assert filled.size <= file.stat().st_size


@pytest.mark.parametrize(
    ("scheme", "inputs", "answer", "nearest"),
    [
        ("int4_g64", 576, Exact, None),
        ("int3_g48_asym", 576, Exact, None),
        ("int4_channel", 100, Exact, None),
        ("int8_channel_a8token", 64, Exact, None),
        ("int8_g32_a8token", 64, Converted, None),
        ("ternary_g32", 64, Exact, None),
        ("int4_g24", 48, Refused, "int4_g16"),
        ("nf4_g64", 128, Refused, None),
        ("nvfp4_a", 128, Refused, None),
    ],
)
def test_what_it_holds_and_what_it_refuses(scheme: str, inputs: int, answer: type, nearest: str | None) -> None:
    found = OnnxExporter().check(CodedLinear("x", named_scheme(scheme), 8, inputs), torch.bfloat16)
    assert isinstance(found, answer)
    assert (found.nearest.name if isinstance(found, Refused) and found.nearest else None) == nearest


def test_the_option_instead_stores_ordinary_weights() -> None:
    site = CodedLinear("x", named_scheme("nf4_g64"), 8, 128)
    found = OnnxExporter(instead="dense").check(site, torch.bfloat16)
    assert isinstance(found, Converted) and not found.keeps_codes and "ordinary weights" in found.why


def test_a_model_without_a_graph_or_with_inputs_that_change_is_refused() -> None:
    exporter = OnnxExporter()
    assert exporter.problem(Contents(config={"model_type": "llama"})) is None
    assert "`mamba`" in str(exporter.problem(Contents(config={"model_type": "mamba"})))
    assert "Threshold" in str(problem_of(InputTransform(Threshold(0.1), dense(3))))
    assert "because" in str(problem_of(Opaque("because")))
    assert problem_of(FORMS["low rank"]) is None


def test_a_table_of_codes_whose_rows_cannot_be_looked_up_is_refused_before_any_work() -> None:
    width = 72
    live = with_coded_table(tiny("llama", hidden_size=width, head_dim=16))
    planned = Contents(rounded_embedding=CodedLinear("embed", named_scheme("int8_channel"), 288, width))
    for contents in (contents_in(live, torch.bfloat16), planned):
        (table,) = contents.tables
        found = OnnxExporter().answers(contents)[table.name]
        assert isinstance(found, Refused) and "rows of 72" in found.why
        assert isinstance(OnnxExporter(instead="dense").answers(contents)[table.name], Converted)
    stored = contents_in(with_coded_table(tiny("llama")), torch.bfloat16)
    assert OnnxExporter().answers(stored) == {"model.embed_tokens": Exact()}


def with_coded_table(model: Any) -> Any:
    scheme, table_VD = named_scheme("int8_channel"), model.get_input_embeddings().weight.detach()
    fitted = fit(table_VD, scheme.weights, scale_dtype=torch.bfloat16)
    model.model.embed_tokens = QuantEmbedding.of(scheme, round_to_codes(table_VD, fitted), fitted, 1.0)
    return model


@pytest.mark.parametrize("coded", [False, True])
def test_blocks_with_other_key_value_heads_than_the_config_are_refused(coded: bool) -> None:
    model = tiny("llama", num_key_value_heads=4)
    attention = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, nn.Linear(64, 32, bias=False))
    attention.o_proj = nn.Linear(32, 64, bias=False)
    if coded:
        quantize(model, ["int4_g32"])
    contents = contents_in(model, torch.bfloat16)
    for exporter in (OnnxExporter(), OpenVinoExporter()):
        assert "layers.1.self_attn" in str(exporter.problem(contents)) and "heads" in str(exporter.problem(contents))
    attention.q_proj, attention.o_proj = nn.Linear(64, 32, bias=False), nn.Linear(32, 64, bias=False)
    attention.k_proj, attention.v_proj = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    assert cache_problem(contents_in(model, torch.bfloat16)) is None


def test_the_plan_names_every_matrix_once_and_every_parameter_beside_them() -> None:
    model = tiny_quantized("llama_tied_biased")
    plan = plan_of(model, contents_in(model, torch.bfloat16), torch.bfloat16)
    assert plan.tied == {"model.embed_tokens"} and isinstance(plan.holes["lm_head"], Tied)
    assert set(plan.parameters) == {name for name, _ in model.named_parameters() if "norm" in name}
    holes = plan.to_json()["holes"]
    assert holes["model.embed_tokens"] == {"width": 64, "looks_up": True}
    assert holes["model.layers.0.mlp.up_proj"] == {"width": 96, "looks_up": False}
    untied = tiny("llama")
    assert not plan_of(untied, contents_in(untied, torch.bfloat16), torch.bfloat16).tied


def test_notes_say_how_the_runtime_computes_and_what_is_wider() -> None:
    model = tiny_quantized("llama", ["int3_g32", "int4_g32"])
    contents, exporter = contents_in(model, torch.bfloat16), OnnxExporter(accuracy_level=0)
    notes = exporter.notes(contents, exporter.answers(contents))
    assert (
        "int3_g32: codes of 3 bits are stored in 4" in notes and "accuracy_level 0: activations stay float32" in notes
    )


def test_matrices_in_8_bits_may_have_an_accuracy_level_of_their_own() -> None:
    nodes = Nodes(torch.bfloat16, accuracy_level=0, accuracy_level_of_8_bits=4)
    levels = {}
    for scheme in ("int4_g16", "int8_channel"):
        (node,) = nodes.fill(coded(scheme, 24, bias=False), scheme, "x", "y")
        levels[scheme] = next(each.i for each in node.attribute if each.name == "accuracy_level")
    assert levels == {"int4_g16": 0, "int8_channel": 4}
    model = tiny_quantized("llama", ["int4_g32", "int8_channel"])
    contents, exporter = contents_in(model, torch.bfloat16), OnnxExporter(accuracy_level=0, accuracy_level_of_8_bits=4)
    assert exporter.notes(contents, exporter.answers(contents)) == [
        "accuracy_level 0: activations stay float32",
        "accuracy_level 4: the runtime rounds activations to 8 bits",
    ]
