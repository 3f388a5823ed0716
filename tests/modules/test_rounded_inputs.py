"""Rounded activations against the library whose folders promise them."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from llmcompress.modules.rounded_inputs import fixed_scale, round_inputs
from llmcompress.modules.scheme import named_scheme

E8M0 = {"scale_dtype": torch.uint8, "zp_dtype": torch.uint8}
E4M3 = {"scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}
WORDS = {
    "int8_channel_a8token": {"num_bits": 8, "strategy": "token", "dynamic": True},
    "fp8_channel_a8token": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    "mxfp4_a": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True, **E8M0},
    "mxfp8_a": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True, **E8M0},
    "nvfp4_a": {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "dynamic": "local",
        **E4M3,
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WORDS)
def test_inputs_are_rounded_as_compressed_tensors_rounds_them(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 50, 64, generator=generator) * torch.randn(2, 50, 1, generator=generator).exp()
    x[0, 0], x[0, 1, :32] = 0, 1.75
    x = x.to(dtype)
    scheme, args = named_scheme(name), QuantizationArgs(**WORDS[name])
    shared = fixed_scale(x.abs().max().float(), scheme) if scheme.measures_inputs else None
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1), global_scale=shared)
    expected = fake_quantize(x, scale, zero, args, global_scale=shared)
    assert torch.equal(round_inputs(x, scheme, shared), expected)


def test_a_static_scale_covers_the_largest_input_seen() -> None:
    x = torch.linspace(-7, 7, 99)
    for name in ("int8_channel_a8tensor", "fp8_tensor_a8tensor", "fp8e5m2_tensor_a8tensor"):
        scheme = named_scheme(name)
        rounded = round_inputs(x, scheme, fixed_scale(x.abs().max(), scheme))
        assert float((rounded - x).abs().max()) < 7 * 0.126
        assert float(rounded[-1]) == pytest.approx(7, rel=0.01)


@pytest.mark.parametrize("name", ["mxfp4_a", "nvfp4_a"])
def test_a_ragged_last_group_has_a_scale_of_its_own(name: str) -> None:
    scheme = named_scheme(name)
    group = scheme.weights.group
    assert group
    x = torch.randn(5, group + 3, generator=torch.Generator().manual_seed(0))
    shared = fixed_scale(x.abs().max(), scheme) if scheme.measures_inputs else None
    whole = round_inputs(x, scheme, shared)
    assert torch.equal(whole[:, :group], round_inputs(x[:, :group], scheme, shared))
    assert torch.equal(whole[:, group:], round_inputs(x[:, group:], scheme, shared))
