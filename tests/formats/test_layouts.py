"""Every layout: what is packed comes back, weighs what was foretold, and is what the format's own library writes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from llmcompress.formats import bitsandbytes, compressed_tensors, packed, plain
from llmcompress.formats.compressed_tensors import Layout, can_name, layout_of
from llmcompress.formats.named import kinds
from llmcompress.modules.bnb_linear import BnbLinear
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.modules.rounded_inputs import fixed_scale
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.packing import pack_words, unpack_words
from llmcompress.numerics.quantized import QuantizedTensor
from llmcompress.numerics.ranges import fit

INTEGERS = [f"int{bits}_{size}{asym}" for bits in range(2, 9) for size in ("channel", "g8") for asym in ("", "_asym")]
TERNARY = ["ternary_channel", "ternary_g8", "ternary_g8_a8token"]
ROUNDED = ["int8_channel_a8token", "int8_channel_a8tensor", "int4_g8_asym_a8token", "fp8_tensor_a8tensor"]
FLOATS = ["fp8_channel", "fp8_g8", "fp8_tensor", "mxfp8", "mxfp4", "nvfp4", "mxfp4_a", "nvfp4_a"]
OURS = [*(f"q{bits}_k" for bits in range(2, 7)), "fp8e5m2_g8", "fp4_g8", "nf4_channel", "int3_g8_positive", "mxfp8_a"]
SHAPES = [(1, 1), (5, 43), (24, 48), (7, 64)]
DTYPES = [torch.bfloat16, torch.float32]


def form(name: str, shape: tuple[int, int], dtype: torch.dtype, *, bias: bool = True) -> Quantized:
    scheme, generator = named_scheme(name), torch.Generator().manual_seed(1)
    weight_OI = torch.randn(shape, generator=generator) + 0.3
    fitted = fit(weight_OI, scheme.weights, scale_dtype=dtype)
    tensor = QuantizedTensor.of(round_to_codes(weight_OI, fitted), fitted)
    fixed = fixed_scale(torch.tensor(2.984375), scheme) if scheme.measures_inputs else None
    bias_O = torch.randn(shape[0], generator=generator).to(dtype) if bias else None
    return Quantized(replace(tensor, scale=tensor.scale.to(dtype)), scheme.activations, fixed, bias=bias_O)


def layouts(name: str) -> list[Layout]:
    scheme = named_scheme(name)
    found = [
        layout_of(scheme, packable=packable, zero_points=zero_points)
        for packable in (True, False)
        for zero_points in ("folded", "packed")
    ]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [*INTEGERS, *TERNARY, *ROUNDED, *FLOATS])
def test_compressed_tensors_there_and_back(name, shape, dtype):
    scheme = named_scheme(name)
    if scheme.weights.bits == 4 and scheme.weights.number:
        shape = (shape[0], shape[1] + shape[1] % 2)  # floats of four bits come in pairs
    given = form(name, shape, dtype)
    for layout in layouts(name):
        stored = compressed_tensors.pack(given, layout, dtype)
        again = compressed_tensors.unpack(stored, layout.grid(given.scheme), dtype)
        assert torch.equal(again.dense(), given.tensor.dense()), layout
        assert torch.equal(again.centred_codes(), given.tensor.centred_codes()), layout
        assert torch.equal(stored["bias"], given.bias)
        assert stored.keys() - {"bias"} <= compressed_tensors.NAMES
        if not layout.symmetric:
            assert torch.equal(again.codes, given.tensor.codes) and torch.equal(
                again.zero_point, given.tensor.zero_point
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [*INTEGERS, *TERNARY, *ROUNDED, *FLOATS, *OURS])
def test_our_own_format_there_and_back(name, shape, dtype):
    given = form(name, shape, dtype)
    stored = packed.pack(given, dtype)
    again = packed.unpack(stored, given.scheme, shape[1], dtype)
    for part in ("codes", "scale", "zero_point", "shared_scale"):
        one, two = getattr(again.tensor, part), getattr(given.tensor, part)
        assert (one is None) == (two is None) and (one is None or (torch.equal(one, two) and one.dtype == two.dtype))
    assert (again.scheme, torch.equal(again.bias, given.bias)) == (given.scheme, True)
    assert stored.keys() - {"bias"} <= packed.NAMES


@pytest.mark.parametrize("transposed", [False, True])
def test_plain_there_and_back(transposed):
    given = form("int4_g8_asym", (5, 43), torch.float32)
    again = plain.unpack(plain.pack(given, torch.float32, transposed=transposed), transposed=transposed)
    assert torch.equal(again.weight, given.dense_weight()) and torch.equal(again.bias, given.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [*INTEGERS, *TERNARY, *ROUNDED, *FLOATS, *OURS])
def test_what_is_foretold_is_what_is_packed(name, shape, bias):
    given, dtype = form(name, shape, torch.bfloat16, bias=bias), torch.bfloat16
    scheme = named_scheme(name)
    assert packed.tensors(shape, scheme, dtype, bias=bias) == kinds(packed.pack(given, dtype))
    assert plain.tensors(shape, dtype, bias=bias) == kinds(plain.pack(given, dtype))
    for layout in layouts(name) if can_name(scheme) else []:
        foretold = compressed_tensors.tensors(shape, scheme, layout, dtype, bias=bias)
        assert foretold == kinds(compressed_tensors.pack(given, layout, dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_are_those_of_the_library(bits, shape):
    codes_OI = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    assert torch.equal(pack_words(codes_OI, bits), pack_to_int32(codes_OI, bits))
    assert torch.equal(pack_words(codes_OI.T, bits).T, pack_to_int32(codes_OI, bits, packed_dim=0))
    assert torch.equal(unpack_words(pack_words(codes_OI, bits), bits, shape[1]), codes_OI)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_codes_of_bitsandbytes_are_taken_apart_without_it(kind):
    weight_OI = torch.randn(12, 128, generator=torch.Generator().manual_seed(0))
    linear = BnbLinear.quantize(kind, weight_OI, None, torch.float32)
    stored = linear.tensors_on_disk()
    (said,) = (node for node in linear.expression().nodes() if isinstance(node, Quantized))
    assert torch.equal(bitsandbytes.unpack(stored, (12, 128)).centred_codes(), said.tensor.centred_codes())
    states = [tensor for name, tensor in stored.items() if bitsandbytes.STATE in f".{name}"]
    assert [bitsandbytes.shape_of(state) for state in states] == ([(12, 128)] if kind == "nf4" else [])


def test_codes_whose_blocks_cross_rows_are_a_matrix_all_the_same():
    linear = BnbLinear.quantize("nf4", torch.randn(12, 80), None, torch.float32)
    assert linear.expression().is_linear
    assert torch.equal(plain.unpack(plain.pack(linear, torch.float32)).weight, linear.dense_weight())
