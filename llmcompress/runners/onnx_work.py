"""What a graph computes in a prefill and reads in a decode step, counted from its tensors. No weights are read."""

from __future__ import annotations

import importlib
from math import prod
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from llmcompress.runners.work import Work

_PRODUCTS = frozenset({"MatMul", "MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat", "FusedMatMul", "Gemm"})
_LOOKUPS = frozenset({"Gather", "GatherBlockQuantized"})
_BITS = {"FLOAT": 32, "FLOAT16": 16, "BFLOAT16": 16, "UINT8": 8, "INT8": 8, "INT64": 64}


def work_of(file: Path, config: PretrainedConfig, sequences: int, tokens: int) -> Work | None:
    """Of a prefill of that many tokens and the decode step after it; None without the package `onnx`."""
    try:
        onnx = importlib.import_module("onnx")
    except ImportError:
        return None
    graph = onnx.load(str(file), load_external_data=False).graph
    held = {each.name: each for each in graph.initializer}
    sizes = {name: prod(each.dims) * _bits(onnx, each) // 8 for name, each in held.items()}
    multiplied = {name for node in graph.node if node.op_type in _PRODUCTS for name in node.input if name in held}
    rows = {
        node.input[0]
        for node in graph.node
        if node.op_type in _LOOKUPS and node.input[0] in held and node.input[0] not in multiplied
    }
    rest = [name for name in held if name not in rows]
    looked_up = sum(sequences * sizes[name] // max(1, held[name].dims[0]) for name in rows)
    products = sum(_product(node, held) for node in graph.node if node.op_type in _PRODUCTS)
    caches = [[dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in graph.input if "past" in each.name]
    width = sum(shape[1] * shape[-1] for shape in caches)
    heads = int(config.get_text_config().num_attention_heads)
    attention = sum(2 * heads * shape[-1] for shape in caches)
    return Work(
        prefill_flops=sequences * (2 * tokens * products + tokens * tokens * attention),
        weight_bytes=sum(sizes[name] for name in rest) + looked_up,
        cache_bytes=4 * sequences * tokens * width,
    )


def _product(node: Any, held: Any) -> int:
    """Multiplications for one token; 0 where both factors are computed."""
    options = {each.name: each.i for each in node.attribute}
    if "K" in options:
        return int(options["K"] * options["N"])
    return int(prod(held[node.input[1]].dims)) if node.input[1] in held else 0


def _bits(onnx: Any, tensor: Any) -> int:
    return _BITS.get(onnx.TensorProto.DataType.Name(tensor.data_type), 32)
