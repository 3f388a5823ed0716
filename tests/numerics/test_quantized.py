"""Codes and scales together: what they stand for, some of their rows, and what they take."""

from __future__ import annotations

import pytest
import torch

from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import restore, round_to_codes
from llmcompress.numerics.quantized import QuantizedTensor
from llmcompress.numerics.ranges import fit

SCHEMES = ["int2_g8", "int3_channel_asym", "int4_g32_asym", "int8_channel", "fp8_tensor", "nf4_g8", "mxfp4", "nvfp4"]
SCHEMES += ["ternary_g8"]


def rounded(name: str, dtype: torch.dtype = torch.float32) -> tuple[QuantizedTensor, torch.Tensor]:
    weight_OI = torch.randn(5, 43, generator=torch.Generator().manual_seed(0))
    weight_OI[2] = 0
    fitted = fit(weight_OI, named_scheme(name).weights, scale_dtype=dtype)
    codes_OI = round_to_codes(weight_OI, fitted)
    return QuantizedTensor.of(codes_OI, fitted), restore(codes_OI, fitted)


@pytest.mark.parametrize("name", SCHEMES)
def test_it_stands_for_what_its_codes_were_rounded_to(name: str) -> None:
    tensor, restored_OI = rounded(name)
    assert torch.equal(tensor.dense(), restored_OI)
    assert tensor.shape == (5, 43) and tensor.weights == 5 * 43


@pytest.mark.parametrize("name", SCHEMES)
def test_some_rows_are_rows_of_the_whole(name: str) -> None:
    tensor, restored_OI = rounded(name)
    for rows in (slice(1, 4), torch.tensor([4, 0, 0])):
        assert torch.equal(tensor.rows(rows).dense(), restored_OI[rows])


@pytest.mark.parametrize("name", SCHEMES)
def test_a_weight_of_zero_has_the_centred_code_zero(name: str) -> None:
    tensor, restored_OI = rounded(name)
    centred_OI = tensor.centred_codes()
    assert bool((restored_OI[centred_OI == 0] == 0).all()) and bool((centred_OI[2] == 0).all())
    if tensor.grid.number is None:  # a table may hold a second, negative zero
        assert bool((centred_OI[restored_OI == 0] == 0).all())


@pytest.mark.parametrize("name", SCHEMES)
def test_its_bits_are_those_that_the_scheme_promises(name: str) -> None:
    tensor, _ = rounded(name)
    assert tensor.bits_per_weight == pytest.approx(named_scheme(name).bits_per_weight(5, 43, 32))
