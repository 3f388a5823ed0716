"""The fields of ONNX Runtime's operators: what is packed comes back, and the runtime itself computes with it."""

from __future__ import annotations

import numpy
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from llmcompress.formats import onnx as fields
from llmcompress.formats.named import kinds
from llmcompress.formats.onnx import NBits, layout
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.quantized import QuantizedTensor
from llmcompress.numerics.ranges import fit

SCHEMES = [
    f"{name}_{size}{asym}"
    for name in ("int2", "int3", "int4", "int6", "int8")
    for size in ("channel", "g16", "g48", "g128", "g512")
    for asym in ("", "_asym")
] + ["ternary_g32", "ternary_channel"]
SHAPES = [(5, 200), (24, 64), (3, 1100)]


def tensor(name: str, shape: tuple[int, int]) -> QuantizedTensor:
    grid = named_scheme(name).weights
    weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.3
    fitted = fit(weight_OI, grid, scale_dtype=torch.bfloat16)
    return QuantizedTensor.of(round_to_codes(weight_OI, fitted), fitted)


def run(node, inits: dict[str, numpy.ndarray], x: numpy.ndarray, kind: int) -> torch.Tensor:
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", kind, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in inits.items()],
    )
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_packed_comes_back_and_the_runtime_computes_with_it(name: str, shape: tuple[int, int]) -> None:
    given, inputs = tensor(name, shape), shape[1]
    kind = layout(given.grid, inputs)
    assert kind is not None
    packed = fields.pack(given, kind)
    assert fields.differing(packed, kind, given) == (0, 0)
    assert torch.equal(fields.dense(packed, kind, inputs), given.dense().float())
    foretold = fields.tensors(shape, named_scheme(name), kind, bias=False)
    held = {"codes": packed.codes, "scales": packed.scale, "zeros": packed.zero}
    assert foretold == kinds({part: each for part, each in held.items() if each is not None})
    inits = {part: each.numpy() for part, each in held.items() if each is not None}
    options = {"K": inputs, "N": shape[0], "bits": kind.bits, "block_size": kind.block, "accuracy_level": 0}
    node = helper.make_node("MatMulNBits", ["x", *inits], ["y"], domain="com.microsoft", **options)
    identity = numpy.eye(inputs, dtype=numpy.float32)
    torch.testing.assert_close(run(node, inits, identity, TensorProto.FLOAT).T, given.dense().float())


@pytest.mark.parametrize("name", ["int8_channel", "int4_g32", "int2_g16", "int8_g32_asym", "int4_g32_asym", "int3_g48"])
def test_a_table_is_looked_up_row_by_row(name: str) -> None:
    given = tensor(name, (40, 192))
    kind = layout(given.grid, 192, looks_up=True)
    assert kind is not None and 192 % kind.block == 0
    packed = fields.pack(given, kind)
    inits = {"codes": packed.codes.numpy(), "scales": packed.scale[..., None].numpy()}
    if packed.zero is not None:
        inits["zeros"] = packed.zero[..., None].numpy()
    options = {"bits": kind.bits, "block_size": kind.block, "gather_axis": 0, "quantize_axis": 2}
    names = ["codes", "x", *list(inits)[1:]]
    node = helper.make_node("GatherBlockQuantized", names, ["y"], domain="com.microsoft", **options)
    found = run(node, inits, numpy.array([[3, 39, 0]]), TensorProto.INT64).reshape(3, 192)
    assert torch.equal(found, given.dense()[[3, 39, 0]].float())


@pytest.mark.parametrize(
    ("name", "inputs", "expected"),
    [
        ("int4_g64", 576, NBits(4, 64)),
        ("int3_g48", 576, NBits(4, 16)),
        ("int8_g1024", 4096, NBits(8, 256)),
        ("int4_channel", 576, NBits(4, 64)),
        ("int8_channel", 1100, NBits(8, 128)),
        ("ternary_g64", 128, NBits(2, 64)),
        ("int4_g24", 48, None),
        ("nf4_g64", 128, None),
        ("fp8_channel", 128, None),
    ],
)
def test_the_narrowest_fields_and_the_longest_blocks_are_taken(name: str, inputs: int, expected: NBits | None) -> None:
    assert layout(named_scheme(name).weights, inputs) == expected


def test_another_code_scale_or_zero_point_is_noticed() -> None:
    given = tensor("int4_g32_asym", (6, 64))
    kind = layout(given.grid, 64)
    assert kind is not None
    for part in ("codes", "scale", "zero"):
        packed = fields.pack(given, kind)
        getattr(packed, part).view(-1)[3] += 1
        assert sum(fields.differing(packed, kind, given)) in (1, 2)
