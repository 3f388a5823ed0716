"""The blocks of GGUF: what is packed comes back, the format's own package decodes the same, and sizes are foretold."""

from __future__ import annotations

from dataclasses import replace

import gguf as package
import pytest
import torch

from llmcompress.formats import gguf
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.quantized import QuantizedTensor
from llmcompress.numerics.ranges import fit

TYPES = {
    "int2_g32": "Q4_0",
    "int3_g64": "Q4_0",
    "int4_g32": "Q4_0",
    "int4_g96": "Q4_0",
    "int4_channel": "Q4_0",
    "int4_g32_positive": "Q4_0",
    "int5_g64": "Q5_0",
    "int6_g32": "Q8_0",
    "int8_g32": "Q8_0",
    "int8_channel": "Q8_0",
    "int2_g32_asym": "Q4_1",
    "int4_g32_asym": "Q4_1",
    "int4_channel_asym": "Q4_1",
    "int5_g64_asym": "Q5_1",
    "ternary_g32": "Q4_0",
    "ternary_g256": "TQ2_0",
    "ternary_channel": "TQ2_0",
    "mxfp4": "MXFP4",
    "q2_k": "Q2_K",
    "q3_k": "Q3_K",
    "q4_k": "Q4_K",
    "q5_k": "Q5_K",
    "q6_k": "Q6_K",
}
K_QUANTS = [name for name in TYPES if name.endswith("_k")]


def codes(name: str, shape: tuple[int, int] = (5, 512), dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.3
    fitted = fit(weight_OI, named_scheme(name).weights, scale_dtype=dtype)
    return QuantizedTensor.of(round_to_codes(weight_OI, fitted), fitted)


@pytest.mark.parametrize("name", TYPES)
def test_codes_and_scales_come_back_and_the_package_decodes_the_same(name: str) -> None:
    tensor = codes(name)
    kind = gguf.block_type(tensor.grid, 512)
    assert kind is not None and kind.name == TYPES[name]
    packed_OC = gguf.pack(tensor, kind)
    found = gguf.unpack(packed_OC, kind)
    assert torch.equal(found.codes, tensor.codes) and gguf.differing(found, tensor) == (0, 0)
    decoded = package.dequantize(packed_OC.numpy(), package.GGMLQuantizationType[kind.name])
    assert torch.equal(torch.from_numpy(decoded), found.dense())
    assert gguf.tensors((5, 512), named_scheme(name), kind, bias=True) == {
        "weight": (torch.uint8, tuple(packed_OC.shape)),
        "bias": (torch.float32, (5,)),
    }
    assert packed_OC.shape[1] == 512 * kind.bits_per_weight / 8


@pytest.mark.parametrize("name", TYPES)
def test_weights_move_by_no_more_than_is_said_and_by_nothing_where_scales_are_bfloat16(name: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        tensor = codes(name, dtype=dtype)
        kind = gguf.block_type(tensor.grid, 512)
        assert kind is not None
        moved_OI = (gguf.unpack(gguf.pack(tensor, kind), kind).dense() - tensor.dense().float()).abs()
        said = gguf.error_in_steps(tensor, kind)
        assert float(moved_OI.max()) <= said * float(tensor.scale.float().abs().max()) * 1.001 + 1e-9
        if (dtype == torch.bfloat16 and not kind.has_minimum) or name in K_QUANTS:
            assert said == 0 and not moved_OI.any()


def test_every_field_of_every_type_is_where_the_package_reads_it() -> None:
    for kind in (kind for kind in gguf.TYPES if kind not in gguf.K_QUANTS.values()):
        ternary = kind in gguf.TERNARY
        fields = torch.arange(256).remainder(3 if ternary else 2**kind.bits).reshape(1, 256)
        grid = named_scheme("mxfp4" if kind is gguf.MXFP4 else "ternary_g256" if ternary else "int8_g32").weights
        zero = torch.full((1, 8), -kind.offset, dtype=torch.int8) if kind.has_minimum else None
        scale = torch.ones(1, 1 if ternary else 8)
        tensor = QuantizedTensor((fields - kind.offset).to(torch.int8), scale, zero, None, grid)
        decoded = package.dequantize(gguf.pack(tensor, kind).numpy(), package.GGMLQuantizationType[kind.name])
        expected = gguf.unpack(gguf.pack(tensor, kind), kind)
        assert torch.equal(torch.from_numpy(decoded), expected.dense()) and torch.equal(expected.codes, tensor.codes)


@pytest.mark.parametrize("name", K_QUANTS)
def test_every_integer_of_a_super_block_is_where_the_package_reads_it(name: str) -> None:
    """Codes, scales and minima that are nowhere alike, as torch and the package restore them."""
    generator, grid = torch.Generator().manual_seed(3), named_scheme(name).weights
    kind, (low, high) = gguf.K_QUANTS[grid], grid.scales.integers
    codes_OI = torch.randint(grid.low, grid.high + 1, (2, 512), generator=generator).to(torch.int8)
    shape = grid.scale_shape(2, 512)
    scale_OG = torch.randint(low, high + 1, shape, generator=generator).float()
    scale_OG[scale_OG == 0] = 1
    minimum_OG = torch.randint(0, high + 1, shape, generator=generator).to(torch.int8) if kind.has_minimum else None
    shared = torch.rand(grid.shared_shape(2, 512) or (), generator=generator).half().float() + 0.5
    tensor = QuantizedTensor(codes_OI, scale_OG, minimum_OG, shared.half().float(), grid)
    packed_OC = gguf.pack(tensor, kind)
    decoded = torch.from_numpy(package.dequantize(packed_OC.numpy(), package.GGMLQuantizationType[kind.name]))
    assert torch.equal(decoded, tensor.dense()) and torch.equal(decoded, gguf.unpack(packed_OC, kind).dense())
    assert gguf.differing(gguf.unpack(packed_OC, kind), tensor) == (0, 0)


def test_ternary_codes_take_the_type_that_is_asked_for() -> None:
    tensor = codes("ternary_g256")
    assert gguf.block_type(tensor.grid, 512, gguf.TQ1_0) is gguf.TQ1_0
    packed_OC = gguf.pack(tensor, gguf.TQ1_0)
    assert packed_OC.shape[1] == 108 and gguf.differing(gguf.unpack(packed_OC, gguf.TQ1_0), tensor) == (0, 0)
    decoded = package.dequantize(packed_OC.numpy(), package.GGMLQuantizationType.TQ1_0)
    assert torch.equal(torch.from_numpy(decoded), tensor.dense().float())


@pytest.mark.parametrize(
    "name", ["int4_g16", "int4_g48", "int8_g32_asym", "fp8_channel", "nf4_g32", "nvfp4", "fp4_g32", "q4_k"]
)
def test_what_no_type_holds_has_none(name: str) -> None:
    assert gguf.block_type(named_scheme(name).weights, 192) is None


def test_rows_must_be_whole_blocks() -> None:
    assert gguf.block_type(named_scheme("int4_channel").weights, 100) is None
    assert gguf.block_type(named_scheme("int4_g64").weights, 96) is gguf.Q4_0  # the last group is one block


def test_a_scale_below_the_range_of_float16_is_said_to_lose_everything() -> None:
    tensor = codes("int4_g32")
    tiny = replace(tensor, scale=tensor.scale * 2.0**-60)
    assert gguf.error_in_steps(tiny, gguf.Q4_0) >= 1
