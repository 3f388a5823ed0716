"""OpenVINO's constants: what is packed comes back, weighs what was foretold, and OpenVINO reads the same numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy
import openvino
import pytest
import torch

from llmcompress.formats.named import kinds
from llmcompress.formats.openvino import DENSE, Constant, dense, element_type, fits, pack, tensors, unpack, values
from llmcompress.modules.scheme import named_scheme
from tests.formats.test_layouts import DTYPES, FLOATS, INTEGERS, OURS, ROUNDED, SHAPES, TERNARY, form

NAMES = [name for name in (*INTEGERS, *TERNARY, *ROUNDED, *FLOATS, *OURS) if not name.endswith("_k")]  # no K-quants


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_and_as_long_as_foretold(name, shape, dtype):
    given = form(name, shape, dtype).tensor
    if not fits(given.grid, shape[1]):
        return
    packed = pack(given)
    again = unpack(packed, given.grid)
    assert torch.equal(again.codes, given.codes)
    if given.zero_point is not None:
        assert torch.equal(again.zero_point, given.zero_point)
    assert torch.equal(again.dense(), replace(given, scale=given.scale.float()).dense())
    found = kinds({name: constant.data for name, constant in packed.present.items()})
    foretold = tensors(shape, named_scheme(name), dtype, bias=False)
    if packed.scale.type == "f16" and dtype == torch.float32:  # scales that happen to need 16 bits alone
        foretold = {**foretold, "scale": found["scale"]}
    assert found == foretold


@pytest.mark.parametrize(
    "name", ["int4_g8", "int3_g8_asym", "int8_g8", "int6_g8_asym", "fp8_g8", "fp8e5m2_g8", "mxfp4", "nf4_g8"]
)
def test_openvino_decodes_the_same_numbers(name):
    packed = pack(form(name, (6, 64), torch.bfloat16).tensor)
    for constant in packed.present.values():
        assert torch.equal(decoded(constant), values(constant)), constant.type


@pytest.mark.parametrize("dtype", DENSE)
def test_ordinary_weights_are_their_bytes(dtype):
    weight = torch.randn(5, 3).to(dtype)
    assert torch.equal(decoded(dense(weight)), weight.float())


def test_a_scale_takes_the_first_type_that_holds_it():
    tensor = form("int4_g8", (4, 16), torch.float32).tensor
    kinds = {
        "f16": torch.full_like(tensor.scale, 2.0**-10),
        "bf16": torch.full_like(tensor.scale, 2.0**-40),
        "f32": torch.full_like(tensor.scale, 1 / 3),
    }
    assert [pack(replace(tensor, scale=scale)).scale.type for scale in kinds.values()] == list(kinds)


def test_narrow_codes_lie_in_fields_of_four_and_eight_bits():
    names = ["int2_g8", "int4_g8", "int5_g8", "int2_g8_asym", "int7_g8_asym", "ternary_g8"]
    assert [element_type(named_scheme(name).weights).name for name in names] == ["i4", "i4", "i8", "u4", "u8", "i4"]


def decoded(constant: Constant) -> torch.Tensor:
    """By OpenVINO, in float32."""
    from openvino import opset13

    numbers = constant.data.numpy()
    shared = openvino.Tensor(numbers, openvino.Shape(list(constant.shape)), getattr(openvino.Type, constant.type))
    node = opset13.convert(opset13.constant(shared, shared_memory=True), "f32")
    model = openvino.Model([node], [], "constant")
    found = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])[0]
    return torch.from_numpy(numpy.array(found))
