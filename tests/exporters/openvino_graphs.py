"""Small graphs as Optimum's frontend would make them, built with OpenVINO's own operations: no Optimum is needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy
import openvino
import torch
from openvino import opset13
from torch import Tensor, nn

from llmcompress.calibration.offloading import InMemory
from llmcompress.exporters.openvino_form import form_of
from llmcompress.exporters.openvino_request import GRAPH, GraphRequest
from llmcompress.exporters.openvino_surgery import read_graph, replace_placeholders, write_graph
from llmcompress.modules.base import CompressedModule

STATE = "sum"


class Sequence(nn.Module):
    """An embedding, the running sum of a text, and linears one after the other: what a language model is to a graph."""

    def __init__(self, embedding: nn.Module, **linears: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        for name, linear in linears.items():
            self.add_module(name, linear)
        for part in self.modules():
            if isinstance(part, CompressedModule):
                part.connect(self)
        self.eval()

    @torch.no_grad()
    def forward(self, ids_BT: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids_BT).cumsum(1)
        for name, part in self.named_children():
            x = x if name == "embedding" else part(x)
        return x


def request_of_sequence(model: Sequence) -> GraphRequest:
    """Its matrices and biases."""
    forms = {name: form for name, part in model.named_children() if (form := form_of(part, as_dense=False))}
    biases = {f"{name}.bias": form.dense_bias() for name, form in forms.items()}
    vectors = {name: bias.detach() for name, bias in biases.items() if bias is not None}
    return GraphRequest(model, {name: form.shape for name, form in forms.items()}, vectors)


def placeholder_graph(request: GraphRequest, *, marks: Mapping[str, int] | None = None) -> openvino.Model:
    """The graph with placeholders, stateful like those of Optimum."""
    ids = opset13.parameter([-1, -1], openvino.Type.i64, "input_ids")
    beam = opset13.parameter([-1], openvino.Type.i32, "beam_idx")
    ids.output(0).set_names({"input_ids"})
    beam.output(0).set_names({"beam_idx"})
    marks, state = marks or request.marks, []
    x = None
    for name, shape in request.shapes.items():
        zeros = numpy.zeros(shape, numpy.float32)
        zeros[0, 0] = marks[name]
        placeholder = opset13.constant(zeros)
        if name == "embedding":
            x = opset13.gather(placeholder, ids, opset13.constant(0))
            x.set_friendly_name(f"__module.model.{name}/aten::embedding/Gather")
            x, state = running_sum(x, beam, shape[1])
            continue
        x = opset13.matmul(x, placeholder, False, True)
        x.set_friendly_name(f"__module.model.{name}/aten::linear/MatMul")
        bias = request.vectors.get(f"{name}.bias")
        if bias is not None:
            x = opset13.add(x, opset13.constant(bias.float().numpy().reshape(1, 1, -1)))
            x.set_friendly_name(f"__module.model.{name}/aten::linear/Add")
    x.output(0).set_names({"logits"})
    return openvino.Model([opset13.result(x)], list(state), [ids, beam], "sequence")


def running_sum(x, beam, width: int):
    """The sum of all vectors so far, kept between calls and put in the order of the beams."""
    info = openvino.op.util.VariableInfo()
    info.data_shape, info.data_type, info.variable_id = openvino.PartialShape([-1, 1, width]), openvino.Type.f32, STATE
    variable = openvino.op.util.Variable(info)
    count = opset13.gather(opset13.shape_of(x), opset13.constant([0]), opset13.constant(0))
    shape = opset13.concat([count, opset13.constant(numpy.array([1, width], numpy.int64))], 0)
    empty = opset13.broadcast(opset13.constant(numpy.float32(0)), shape)
    before = opset13.gather(opset13.read_value(empty, variable), beam, opset13.constant(0))
    total = opset13.add(opset13.cum_sum(x, opset13.constant(1)), before)
    last = opset13.gather(total, opset13.constant([-1]), opset13.constant(1))
    return total, [opset13.assign(last, variable)]


def write_sequence(model: Sequence, folder: Path, dtype: torch.dtype = torch.float32) -> GraphRequest:
    """Surgery on its graph, written there; what was put in."""
    request, file = request_of_sequence(model), folder / f"{GRAPH}.xml"
    folder.mkdir(parents=True, exist_ok=True)
    openvino.save_model(placeholder_graph(request), folder / "placeholders.xml", compress_to_fp16=False)
    graph = read_graph(folder / "placeholders.xml")
    kept = replace_placeholders(graph, request, dtype, weights_at=InMemory())
    write_graph(graph, file)
    del graph, kept
    return request
