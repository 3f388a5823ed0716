"""ONNX Runtime: graphs of products of one kind, made by the exporter's own nodes, and small models that it exports."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import torch
from typing_extensions import override

from llmcompress.exporters.onnx import OnnxExporter
from llmcompress.exporters.onnx_nodes import MICROSOFT, Nodes
from llmcompress.exporters.onnx_package import onnx_package
from llmcompress.formats import onnx as fields
from llmcompress.modules.scheme import named_scheme
from llmcompress.plan_search.costs.bench import BENCHES, ExportedBench, Unmeasurable, random_expression
from llmcompress.plan_search.costs.forms import DENSE, Matrix

_OPSET = 18
_ERRORS = 3


@BENCHES.register("onnxruntime")
class OnnxRuntimeBench(ExportedBench):
    """On the processor, as the runner runs it."""

    target: ClassVar[str] = "onnx"
    head_sees_prompt: ClassVar[bool] = True

    @override
    def products(self, matrix: Matrix, copies: int, *, tied: bool = False) -> Callable[[int], Callable[[], None]]:
        if matrix.form != DENSE and fields.layout(named_scheme(matrix.form).weights, matrix.inputs) is None:
            raise Unmeasurable(f"no operator of ONNX Runtime holds {matrix.form}")
        library = _library()
        options = library.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = _ERRORS
        graph = _graph(matrix, copies, tied=tied).SerializeToString()
        session = library.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

        def for_tokens(tokens: int) -> Callable[[], None]:
            binding = session.io_binding()
            binding.bind_cpu_input("x", torch.randn(1, tokens, matrix.inputs).numpy())
            # one place for all results: in a model they lie in memory that was used a moment ago
            place = library.OrtValue.ortvalue_from_numpy(torch.zeros(1, tokens, matrix.outputs).numpy())
            for number in range(copies):
                binding.bind_ortvalue_output(f"y{number}", place)

            def run() -> None:
                session.run_with_iobinding(binding)

            return run

        return for_tokens

    @override
    def versions(self) -> dict[str, str]:
        return {"onnxruntime": str(_library().__version__)}


def _graph(matrix: Matrix, copies: int, *, tied: bool) -> Any:
    """`y0`, `y1`, … from `x`: as many products as copies."""
    package = onnx_package()
    helper, floats = package.helper, package.TensorProto.FLOAT
    owners = [f"m{number}" for number in range(copies)]
    level = OnnxExporter().accuracy_level
    nodes = Nodes(torch.float32, level, tied=frozenset(f"{name}.table" for name in owners) if tied else frozenset())
    found = []
    for number, name in enumerate(owners):
        found += nodes.fill(random_expression(matrix, f"{name}.table", tied=tied), name, "x", f"y{number}")
    values = [
        package.numpy_helper.from_array(held.make().contiguous().numpy(), name) for name, held in nodes.held.items()
    ]
    x = helper.make_tensor_value_info("x", floats, [1, None, matrix.inputs])
    ys = [helper.make_tensor_value_info(f"y{number}", floats, [1, None, matrix.outputs]) for number in range(copies)]
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(MICROSOFT, 1)]
    graph = helper.make_graph(found, "products", [x], ys, values)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _library() -> ModuleType:
    return importlib.import_module("onnxruntime")
