"""Puts our matrices into OpenVINO's graph, in the place of its placeholders."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from llmcompress.calibration.offloading import WeightStore
from llmcompress.errors import CompressError
from llmcompress.exporters.checkpoint import block_of
from llmcompress.exporters.openvino_nodes import NodeMaker
from llmcompress.exporters.openvino_request import GraphRequest
from llmcompress.modules.expression import Gather
from llmcompress.runners.openvino_package import openvino_operations, openvino_package

_NODE = re.compile(r"__module\.(?P<module>.+)/aten::(?:linear|addmm|matmul|embedding)/")
"""What OpenVINO's frontend calls the nodes of a module; Optimum may have wrapped the model in another one."""
_WRAPPER = "model."
_WEIGHT_INPUT = {"MatMul": 1, "Gather": 0}
_STEPS = frozenset({"Transpose", "Convert", "Reshape"})
"""Between a placeholder and the node that reads it."""


def replace_placeholders(
    graph: Any, request: GraphRequest, dtype: torch.dtype, *, weights_at: WeightStore
) -> NodeMaker:
    """In place; the result must live until the graph is written. Weights of a block are offloaded when it is done.

    Raises: CompressError when the graph is not that of the model.
    """
    nodes, marks, maker = dict(_nodes(graph, request.shapes)), request.marks, NodeMaker(dtype)
    # what is looked up comes first: a tied head reads its table
    names = sorted(request.shapes, key=lambda name: name in nodes and nodes[name].get_type_name() != "Gather")
    for block, members in groupby(names, key=block_of):
        for name in members:
            if name not in nodes or _mark(nodes[name]) != marks[name]:
                raise _unknown(name)
            _replace(nodes[name], request, name, maker)
        if block:
            name = block.removesuffix(".")
            weights_at.leave(name, request.model.get_submodule(name))
    return maker


def read_graph(file: Path) -> Any:
    """The graph of an `.xml` file."""
    return openvino_package("export.package").Core().read_model(str(file))


def keep_activations(graph: Any) -> None:
    """Tell the runtime not to round activations before compressed matrices, unless a caller asks for it."""
    graph.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])


def write_graph(graph: Any, file: Path) -> None:
    """The `.xml` file and its `.bin`."""
    openvino_package("export.package").save_model(graph, str(file), compress_to_fp16=False)


def _nodes(graph: Any, names: Container[str]) -> Iterator[tuple[str, Any]]:
    """Name of a module → the one node that reads its placeholder."""
    for node in graph.get_ordered_ops():
        found = _NODE.match(node.get_friendly_name())
        if node.get_type_name() in _WEIGHT_INPUT and found is not None and _placeholder(node) is not None:
            name = found["module"]
            name = name if name in names else name.removeprefix(_WRAPPER)
            if name in names:
                yield name, node


def _placeholder(node: Any) -> Any:
    """The constant that a node multiplies by or looks up; None where it reads something that is computed."""
    source = node.input_value(_WEIGHT_INPUT[node.get_type_name()]).get_node()
    while source.get_type_name() in _STEPS:
        source = source.input_value(0).get_node()
    return source if source.get_type_name() == "Constant" else None


def _mark(node: Any) -> float:
    return float(_placeholder(node).data.flat[0])


def _replace(node: Any, request: GraphRequest, name: str, maker: NodeMaker) -> None:
    form, placeholder = request.form(name), _placeholder(node)
    for reader in list(placeholder.output(0).get_target_inputs()):
        if reader.get_node().get_type_name() == "ShapeOf":
            shape = openvino_operations().constant(list(form.shape), dtype=reader.get_node().get_element_type())
            reader.get_node().output(0).replace(shape.output(0))
    if isinstance(form, Gather):
        node.input(_WEIGHT_INPUT["Gather"]).replace_source_output(maker.table(form, name).output(0))
        return
    made = maker.product(form, name, node.input_value(0))
    made.set_friendly_name(node.get_friendly_name())
    node.output(0).replace(made.output(0))


def _unknown(name: str) -> CompressError:
    return CompressError(
        "export.graph",
        "the graph that Optimum made of this model does not read this module as expected",
        where=name,
        fix="export to another target, such as `gguf` or `onnx`, and report the model's family",
    )
