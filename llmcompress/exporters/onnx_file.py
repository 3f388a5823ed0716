"""Fills the holes of a graph, writes it with its tensors in a file beside it, and reads both back to compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.calibration.offloading import WeightStore
from llmcompress.exporters.checkpoint import block_of
from llmcompress.exporters.onnx_fold import fold_constants
from llmcompress.exporters.onnx_graph import Plan, holes_in
from llmcompress.exporters.onnx_graph_program import DOMAIN
from llmcompress.exporters.onnx_nodes import MICROSOFT, Held, HeldCodes, Nodes
from llmcompress.exporters.onnx_package import onnx_package
from llmcompress.formats import onnx as fields
from llmcompress.records.export_report import ReadBack
from llmcompress.storage.disk import sync

FILE, DATA = "model.onnx", "model.onnx_data"
_PAGE = 4096
"""Tensors begin at pages, so that a runtime can map them from the file."""
_INSIDE = 1024
"""Bytes of a tensor that stays in the graph: constants, which graph optimizers look at."""
_TYPES = {
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.uint8: "UINT8",
    torch.int8: "INT8",
    torch.int64: "INT64",
}


def fill(proto: Any, plan: Plan, nodes: Nodes) -> None:
    """Replace every hole by the nodes of its expression, in place, and take placeholders of parameters out.

    Where all sizes are fixed, what follows from them is computed first.
    """
    graph = proto.graph
    if plan.sequence is not None:
        fold_constants(proto, plan.parameters.keys())
    made = {
        hole.output[0]: nodes.fill(plan.holes[name], name, hole.input[0], hole.output[0])
        for name, hole in holes_in(proto).items()
    }
    new = [each for node in graph.node for each in (made[node.output[0]] if node.domain == DOMAIN else [node])]
    del graph.node[:]
    graph.node.extend(new)
    kept = [each for each in graph.initializer if each.name not in plan.parameters]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    domains = [each for each in proto.opset_import if each.domain not in (DOMAIN, MICROSOFT)]
    del proto.opset_import[:]
    own = [onnx_package().helper.make_opsetid(MICROSOFT, 1)] if any(node.domain == MICROSOFT for node in new) else []
    proto.opset_import.extend([*domains, *own])
    _fix_outputs(graph, plan)


def tensors_of(plan: Plan, nodes: Nodes, model: nn.Module) -> Nodes:
    """With everything that the file holds of a model, block after block, whether or not a graph was nodes."""
    for name, form in plan.holes.items():
        nodes.fill(form, name, "x", "y")
    for name, shape in plan.parameters.items():
        make = partial(_parameter, model, name, nodes.storage_dtype)
        nodes.held[name] = Held(name, name, shape, torch.float32, make)
    places = {block: place for place, block in enumerate(dict.fromkeys(map(block_of, model.state_dict())))}
    ordered = sorted(nodes.held.items(), key=lambda each: places.get(block_of(each[1].source), -1))
    return replace(nodes, held=dict(ordered))


def write(proto: Any, nodes: Nodes, folder: Path, model: nn.Module, weights_at: WeightStore) -> int:
    """Write both files, one tensor in memory at a time; the bytes of all tensors."""
    types, total = onnx_package().TensorProto, 0
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / DATA).open("wb") as data:
        for block, members in groupby(nodes.held.values(), key=lambda each: block_of(each.source)):
            for held in members:
                value = held.make().detach().cpu().contiguous()
                assert tuple(value.shape) == held.shape and value.dtype == held.dtype, held.name
                total += value.nbytes
                tensor = types(name=held.name, dims=held.shape, data_type=types.DataType.Value(_TYPES[held.dtype]))
                content = value.reshape(-1).view(torch.uint8).numpy()
                if value.nbytes <= _INSIDE:
                    tensor.raw_data = content.tobytes()
                else:
                    data.write(bytes(-data.tell() % _PAGE))
                    _point(tensor, data.tell(), value.nbytes)
                    content.tofile(data)
                proto.graph.initializer.append(tensor)
            if block:
                name = block.removesuffix(".")
                weights_at.leave(name, model.get_submodule(name))
    sync(folder / DATA)
    (folder / FILE).write_bytes(proto.SerializeToString())
    return total


def read_back(folder: Path, nodes: Nodes) -> list[ReadBack]:
    """Read every tensor again from the places that the graph names, and compare."""
    proto = onnx_package().load(str(folder / FILE), load_external_data=False)
    stored = {each.name: each for each in proto.graph.initializer}
    assert nodes.held.keys() <= stored.keys()
    coded = {f"{each.source}.{part}" for each in nodes.codes.values() for part in ("codes", "scales", "zeros")}
    rows = [_codes(folder, each, stored) for each in nodes.codes.values()]
    for name, held in nodes.held.items():
        if name not in coded and held.source:
            found, wanted = _read(folder, stored[name]), held.make()
            differing = int((found != wanted).sum()) if found.shape == wanted.shape else wanted.numel()
            kind = _TYPES[held.dtype].lower()
            rows.append(ReadBack(source=name, stored_as=kind, values=wanted.numel(), weights_differing=differing))
    return rows


def _codes(folder: Path, codes: HeldCodes, stored: Mapping[str, Any]) -> ReadBack:
    found = _read(folder, stored[f"{codes.source}.codes"])
    scale = _read(folder, stored[f"{codes.source}.scales"])
    zeros = stored.get(f"{codes.source}.zeros")
    tensor, kind = codes.tensor, codes.kind
    if kind is None:
        differing = int((tensor.codes != found.T).sum()), int((scale != tensor.scale.float()[:, 0]).sum())
        weights = found.T.float() * scale[:, None]
    else:
        held = fields.Fields(found, scale, None if zeros is None else _read(folder, zeros))
        differing = fields.differing(held, kind, tensor)
        weights = fields.dense(held, kind, tensor.shape[1])
    return ReadBack(
        source=codes.source,
        stored_as="int8" if kind is None else f"{kind.bits} bits, blocks of {kind.block}",
        values=prod(tensor.shape),
        codes_differing=differing[0],
        scales_differing=differing[1],
        rounding_in_steps=0.0,
        weights_differing=int((weights.to(tensor.scale.dtype) != tensor.dense()).sum()),
    )


def _read(folder: Path, tensor: Any) -> Tensor:
    """A tensor of the file, mapped where it is outside of the graph."""
    types = onnx_package().TensorProto
    dtype = next(dtype for dtype, name in _TYPES.items() if types.DataType.Value(name) == tensor.data_type)
    shape = tuple(tensor.dims)
    if tensor.data_location == types.EXTERNAL:
        place = {each.key: each.value for each in tensor.external_data}
        offset, length = int(place["offset"]), int(place["length"])
        whole = torch.from_file(str(folder / place["location"]), size=offset + length, dtype=torch.uint8)
        content = whole[offset:]
    else:
        content = torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.uint8) if tensor.raw_data else torch.empty(0)
    return content.view(dtype).reshape(shape) if prod(shape) else torch.empty(shape, dtype=dtype)


def _parameter(model: nn.Module, name: str, storage_dtype: torch.dtype) -> Tensor:
    return model.get_parameter(name).detach().to(storage_dtype).float()


def _point(tensor: Any, offset: int, length: int) -> None:
    """Where its numbers are."""
    tensor.data_location = onnx_package().TensorProto.EXTERNAL
    for key, value in (("location", DATA), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)


def _fix_outputs(graph: Any, plan: Plan) -> None:
    """Sizes that do not change stand in the graph: loaders look there for the vocabulary and the shape of the cache."""
    vocabulary = int(plan.config["vocab_size"])
    if plan.sequence is not None:
        for each in (*graph.input, *graph.output):
            logits = (vocabulary,) if each.name == "logits" else ()
            _set_sizes(each, (1, plan.sequence, *logits))
        return
    inputs = {each.name: each for each in graph.input}
    for output in graph.output:
        dims = output.type.tensor_type.shape.dim
        past = inputs.get(output.name.replace("present", "past_key_values"))
        if past is not None:
            for number, dim in enumerate(past.type.tensor_type.shape.dim):
                if dim.HasField("dim_value"):
                    dims[number].dim_value = dim.dim_value
        elif output.name == "logits":
            dims[len(dims) - 1].dim_value = vocabulary


def _set_sizes(value: Any, sizes: tuple[int, ...]) -> None:
    dims = value.type.tensor_type.shape.dim
    del dims[:]
    for size in sizes:
        dims.add().dim_value = size
