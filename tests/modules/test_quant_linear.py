"""The quantized linear runs what will be shipped."""

import pytest
import torch
from torch.nn import functional

from llmcompress.errors import CompressError
from llmcompress.formats import packed
from llmcompress.formats.packed_linear import PackedLinear
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.rounded_inputs import fixed_scale, round_activations
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import restore, round_to_codes
from llmcompress.numerics.ranges import fit

NAMES = [
    f"int{bits}_{size}{asym}" for bits in range(2, 9) for size in ("channel", "g8", "g32") for asym in ("", "_asym")
]
NAMES += ["int8_channel_a8token", "int8_channel_a8tensor"]
NAMES += [
    f"{fp8}_{size}{a8}"
    for fp8 in ("fp8", "fp8e5m2")
    for size in ("g8", "channel", "tensor")
    for a8 in ("", "_a8token", "_a8tensor")
]
NAMES += ["fp4_channel", "fp4_g16", "nf4_g8", "nf4_channel"]
NAMES += [f"{fixed}{a}" for fixed in ("mxfp4", "mxfp8", "nvfp4") for a in ("", "_a")]


def make(name: str, inputs: int = 43, dtype: torch.dtype = torch.float32) -> QuantLinear:
    scheme = named_scheme(name)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, inputs, generator=generator)
    fitted = fit(weight, scheme.weights, scale_dtype=dtype)
    scale = fixed_scale(torch.tensor(2.98828125), scheme) if scheme.measures_inputs else None
    return QuantLinear.from_fitted(
        scheme, round_to_codes(weight, fitted), fitted, torch.randn(5, generator=generator), scale
    )


@pytest.mark.parametrize("name", NAMES)
def test_names_read_back(name: str) -> None:
    assert named_scheme(name).name == name


@pytest.mark.parametrize(
    "name",
    [
        "int4",
        "int9_g32",
        "int4_g0",
        "int4_tensor",
        "fp8_g8_asym",
        "fp4_tensor",
        "fp4_g8_a8token",
        "mxfp4_g32",
        "nvfp4_a8token",
        "int4_g32_a4token",
        "fp8",
        "int4_asym_g32",
        "",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(CompressError, match="is not a quantization scheme"):
        named_scheme(name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("int4_128", "int4_g128"), ("fp8_chanel", "fp8_channel"), ("mxfp5", "mxfp"), ("nf4_64", "nf4_g64")],
)
def test_the_nearest_name_is_offered(name: str, meant: str) -> None:
    with pytest.raises(CompressError) as raised:
        named_scheme(name)
    assert raised.value.fix and f"did you mean `{meant}" in raised.value.fix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_packed_codes_and_scales_come_back_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    linear = make(name, dtype=dtype).to(dtype)
    form = PackedLinear(QuantLinear.from_spec(linear.spec(), dtype))
    form.load_state_dict(packed.pack(linear.expression(), dtype), strict=True)
    again = form.unpack()
    assert torch.equal(again.dense_weight(), linear.dense_weight())
    x = torch.randn(2, 3, 43, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(again(x), linear(x))


@pytest.mark.parametrize("name", NAMES)
def test_packed_bytes_are_those_of_bits_per_weight(name: str) -> None:
    linear = make(name, inputs=64, dtype=torch.bfloat16).to(torch.bfloat16)
    tensors = packed.pack(linear.expression(), torch.bfloat16)
    size = sum(t.numel() * t.element_size() for key, t in tensors.items() if key not in ("bias", "input_scale"))
    zeros = tensors["zero_point"].numel() if "zero_point" in tensors else 0  # a byte each in the file
    bits = linear.scheme.bits_per_weight(5, 64, 16) * 5 * 64
    assert size * 8 == round(bits) + zeros * (8 - linear.scheme.weights.bits)


@pytest.mark.parametrize("name", NAMES)
def test_spec_and_state_make_the_same_module_again(name: str) -> None:
    linear = make(name)
    again = QuantLinear.from_spec(linear.spec(), torch.float32)
    again.load_state_dict(linear.state_dict(), strict=True)
    x = torch.randn(2, 3, 43, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again(x), linear(x))


@pytest.mark.parametrize("name", NAMES)
def test_casting_to_the_stored_type_and_back_loses_nothing(name: str) -> None:
    linear = make(name, dtype=torch.bfloat16)
    before = linear.dense_weight()
    assert torch.equal(linear.bfloat16().float().dense_weight(), before)


def test_forward_is_a_linear_with_the_restored_weight() -> None:
    linear = make("int4_g8_asym")
    x = torch.randn(2, 3, 43, generator=torch.Generator().manual_seed(1))
    assert torch.equal(linear(x), functional.linear(x, linear.dense_weight(), linear.bias))


def test_bits_per_weight_count_scales_and_zero_points() -> None:
    assert named_scheme("int4_g32").bits_per_weight(64, 64, 16) == 4.5
    assert named_scheme("int4_g32_asym").bits_per_weight(64, 64, 16) == 4.625
    assert named_scheme("int8_channel").bits_per_weight(64, 64, 16) == 8.25
    assert named_scheme("fp8_tensor").bits_per_weight(64, 64, 16) == 8 + 16 / 4096
    assert named_scheme("mxfp4").bits_per_weight(64, 64, 16) == 4.25
    assert named_scheme("nvfp4").bits_per_weight(64, 64, 16) == 4.5 + 32 / 4096
    assert named_scheme("nf4_g64").bits_per_weight(64, 64, 16) == 4.25
    assert named_scheme("int4_g32").bits_per_weight(64, 43, 16) == 4 + 16 * 2 / 43  # a ragged last group has a scale


def test_activations_are_rounded_per_token_with_integers() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0, 0.0])[:, None]
    rounded = round_activations(x, None)
    for row, true in zip(rounded.reshape(-1, 8), x.reshape(-1, 8), strict=True):
        step = float(true.abs().max()) / 127.5
        for got, value in zip(row.tolist(), true.tolist(), strict=True):
            code = max(-128, min(127, value / step)) if step else 0
            if abs(code) > 127.4:  # the largest value lies half-way between two codes, by the format's own scale
                assert abs(got - value) <= 0.51 * step
                continue
            assert abs(got - round(code) * step) < 1e-5 * max(step, 1)
    assert (rounded[:, 2] == 0).all()


def test_integer_arithmetic_gives_what_the_float_round_trip_gives() -> None:
    linear = make("int8_channel_a8tensor")
    x = torch.randn(7, 43, generator=torch.Generator().manual_seed(1))
    scale = linear.input_scale
    assert scale is not None
    codes = (x / scale).clamp(-128, 127).round().to(torch.int32)
    product = codes.long() @ linear.codes_OI.long().T
    expected = product * scale * linear.scale_OG.T + linear.bias
    torch.testing.assert_close(linear(x), expected, atol=1e-4, rtol=1e-4)


def test_restored_weights_come_from_codes_alone() -> None:
    linear = make("int3_g32")
    from llmcompress.numerics.grid import Fitted

    zeros = torch.zeros_like(linear.scale_OG)
    assert torch.equal(
        linear.dense_weight(), restore(linear.codes_OI, Fitted(linear.scheme.weights, linear.scale_OG, zeros))
    )
