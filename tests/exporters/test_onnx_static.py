"""The profile of fixed sizes: standard operators alone, int8 with our codes, no free dimension; and what is refused."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from llmcompress.calibration.offloading import InMemory
from llmcompress.cli.export import export as export_command
from llmcompress.exporters.base import Exact, Refused
from llmcompress.exporters.contents import CodedLinear, Contents, contents_in
from llmcompress.exporters.onnx_file import FILE, fill, read_back, tensors_of, write
from llmcompress.exporters.onnx_graph import Plan
from llmcompress.exporters.onnx_static import OnnxStaticExporter, StaticNodes
from llmcompress.modules.expression import Expression, Gather, Tied
from llmcompress.modules.scheme import named_scheme
from llmcompress.runners.onnxruntime import OnnxRuntimeRunner
from tests.exporters.gguf_models import tiny, tiny_quantized
from tests.exporters.test_onnx import IDS_BT, X_BTI, Filled, coded, dense, with_coded_table, with_holes

TABLE = coded("int8_channel", 40, bias=False)
FORMS: dict[str, Expression] = {
    "calibrated": coded("int8_channel_a8tensor", 24),
    "four bits": coded("int4_channel_a8tensor", 24, bias=False),
    "rows of codes": Gather(TABLE, 0.5),
    "head": Tied("rows of codes", TABLE),
    "rows": Gather(dense(40, bias=False)),
    "dense head": Tied("rows", dense(40, bias=False)),
    "head of its own": coded("int8_channel", 40),
}


class StaticFilled(Filled):
    def __init__(self, folder: Path) -> None:
        self.folder, self.plan = folder, Plan({"vocab_size": 40}, FORMS, {}, {})
        self.proto = with_holes(FORMS)
        nodes = StaticNodes(torch.bfloat16, 0, tied=self.plan.tied)
        fill(self.proto, self.plan, nodes)
        self.nodes = tensors_of(self.plan, nodes, nn.Module())
        write(self.proto, self.nodes, folder, nn.Module(), InMemory())
        # by itself the runtime rounds the inputs of weight-only products to 8 bits
        self.options = onnxruntime.SessionOptions()
        self.options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")


def test_standard_operators_compute_what_expressions_compute_from_our_codes(tmp_path: Path) -> None:
    filled = StaticFilled(tmp_path)
    found = filled.run()
    for name, form in FORMS.items():
        wanted = form(IDS_BT if isinstance(form, Gather) else X_BTI)
        torch.testing.assert_close(
            found[name], wanted, rtol=1e-5, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert {each.domain for each in onnx.load(str(tmp_path / FILE)).opset_import} == {""}
    rows = {row.source: row for row in read_back(tmp_path, filled.nodes)}
    assert all(row.is_same for row in rows.values())
    assert all(rows[name].codes_differing == 0 for name in ("calibrated", "four bits", "rows of codes"))


@pytest.mark.parametrize(
    ("scheme", "answer"),
    [
        ("int8_channel_a8tensor", Exact),
        ("int4_channel_a8tensor", Exact),
        ("int8_channel_a8token", Refused),
        ("int4_g64", Refused),
        ("int8_channel", Refused),
        ("nf4_g64", Refused),
    ],
)
def test_linears_need_whole_rows_and_calibrated_activations(scheme: str, answer: type) -> None:
    found = OnnxStaticExporter().check(CodedLinear("x", named_scheme(scheme), 8, 128), torch.bfloat16)
    assert isinstance(found, answer)
    assert not isinstance(found, Refused) or str(found.nearest and found.nearest.name) == "int8_channel_a8tensor"


def test_a_model_with_a_dense_linear_in_a_block_is_refused_and_its_table_may_be_codes() -> None:
    exporter = OnnxStaticExporter()
    model = with_coded_table(tiny_quantized("llama", ["int8_channel_a8tensor"]))
    contents = contents_in(model, torch.bfloat16)
    assert exporter.problem(contents) is None
    assert all(isinstance(each, Exact) for each in exporter.answers(contents).values())
    assert "lm_head: float32" in exporter.notes(contents, {})
    dense_model = contents_in(tiny("llama"), torch.float32)
    assert "q_proj (of 14 in blocks) is not quantized" in str(exporter.problem(dense_model))
    asymmetric = Contents(rounded_embedding=CodedLinear("embed", named_scheme("int8_channel_asym"), 40, 64))
    assert isinstance(exporter.answers(asymmetric)["embed"], Refused)


def test_the_flag_names_the_target_and_needs_onnx() -> None:
    given = ["nowhere", "--to", "gguf", "--profile", "static-int8", "-o", "x"]
    result = CliRunner().invoke(export_command, given)
    assert result.exit_code == 2 and "only the target onnx has profiles" in result.output


def test_the_runner_fills_a_text_up_and_computes_it_again_for_every_token(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    ids = value("input_ids", onnx.TensorProto.INT64, [1, 6])
    logits = value("logits", onnx.TensorProto.FLOAT, [1, 6, 288])
    nodes = [
        onnx.helper.make_node("Add", ["input_ids", "one"], ["next"]),
        onnx.helper.make_node("OneHot", ["next", "depth", "values"], ["logits"]),
    ]
    constants = [
        onnx.numpy_helper.from_array(torch.tensor(1).numpy(), "one"),
        onnx.numpy_helper.from_array(torch.tensor(288).numpy(), "depth"),
        onnx.numpy_helper.from_array(torch.tensor([0.0, 1.0]).numpy(), "values"),
    ]
    graph = onnx.helper.make_graph(nodes, "next", [ids], [logits], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(tmp_path / FILE))
    tiny("llama").config.save_pretrained(tmp_path)
    with OnnxRuntimeRunner.open(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32) as runner:
        assert runner.max_positions == 6
        assert torch.equal(runner.logits(torch.tensor([[3, 4], [7, 8]])).argmax(-1), torch.tensor([[4, 5], [8, 9]]))
        assert runner.generate([[3], [7, 20]], max_new_tokens=3) == [[4, 5, 6], [21, 22, 23]]
