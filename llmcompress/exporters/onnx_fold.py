"""Computes everything in a graph of fixed sizes that does not depend on its inputs: shapes, indices, masks."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy

from llmcompress.exporters.onnx_package import onnx_package

_LARGEST = 1 << 24
"""Bytes of a result that is worth to be a constant."""


def fold_constants(proto: Any, variables: Collection[str]) -> None:
    """Replace such nodes by constants, in place; `variables` are initializers that only hold a place."""
    while _fold_once(proto, variables):
        pass


def _fold_once(proto: Any, variables: Collection[str]) -> bool:
    """Whether anything was folded: with every constant more shapes can be inferred."""
    package, graph = onnx_package(), proto.graph
    inferred = package.shape_inference.infer_shapes(proto, data_prop=True).graph
    shapes = dict(_known_shapes(inferred))
    known = {each.name: package.numpy_helper.to_array(each) for each in graph.initializer if each.name not in variables}
    kept, folded = [], False
    for node in graph.node:
        found = _value(node, known, shapes)
        if found is None:
            kept.append(node)
        else:
            known[node.output[0]] = found
            folded = True
    if folded:
        used = {name for node in kept for name in node.input} | {each.name for each in graph.output}
        rest = [each for each in graph.initializer if each.name in variables]
        made = [package.numpy_helper.from_array(value, name) for name, value in known.items() if name in used]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(kept)
        graph.initializer.extend([*rest, *made])
        graph.value_info.extend(each for each in inferred.value_info if each.name not in known)
    return folded


def _value(node: Any, known: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Any:
    """What a node with one output computes from constants, or from a shape; None: it depends on more."""
    if len(node.output) != 1 or node.domain:
        return None
    if node.op_type == "Shape" and node.input[0] in shapes and not node.attribute:
        return numpy.array(shapes[node.input[0]], dtype=numpy.int64)
    if any(name not in known for name in node.input if name):
        return None
    package = onnx_package()
    names = [name for name in dict.fromkeys(node.input) if name]
    inputs = [
        package.helper.make_tensor_value_info(
            name, package.helper.np_dtype_to_tensor_dtype(known[name].dtype), known[name].shape
        )
        for name in names
    ]
    output = package.ValueInfoProto(name=node.output[0])
    graph = package.helper.make_graph([node], "one", inputs, [output])
    evaluator = importlib.import_module("onnx.reference").ReferenceEvaluator
    opset = package.helper.make_opsetid("", package.defs.onnx_opset_version())
    (value,) = evaluator(package.helper.make_model(graph, opset_imports=[opset])).run(
        None, {name: known[name] for name in names}
    )
    found = numpy.asarray(value)
    return found if found.nbytes <= _LARGEST else None


def _known_shapes(graph: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    for each in (*graph.input, *graph.value_info):
        tensor = each.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            yield each.name, tuple(dim.dim_value for dim in tensor.shape.dim)
