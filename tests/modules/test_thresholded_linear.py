"""A thresholded linear is the linear on inputs whose small values are zero, whichever way it computes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from llmcompress.modules.base import from_named_spec, named_spec
from llmcompress.modules.dynamic import tallied
from llmcompress.modules.dynamic_activations import GATHER_BELOW, ThresholdedLinear


def parts(outputs: int, inputs: int, *, bias: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(outputs)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    return weight_OI, torch.randn(outputs, generator=generator) if bias else None


def thresholded(weight_OI: torch.Tensor, bias_O: torch.Tensor | None, threshold: float) -> ThresholdedLinear:
    return ThresholdedLinear(weight_OI.T.contiguous(), bias_O, threshold)


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 13), (1, 1), (24, 64), (64, 1)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.5, 100.0])
@pytest.mark.parametrize("tokens", [(1, 1), (2, 5)])
def test_it_is_the_product_with_small_inputs_zeroed(outputs, inputs, bias, threshold, tokens) -> None:
    weight_OI, bias_O = parts(outputs, inputs, bias=bias)
    x = torch.randn(*tokens, inputs, generator=torch.Generator().manual_seed(1))
    large = torch.where(x.abs() > threshold, x, torch.zeros(()))
    found = thresholded(weight_OI, bias_O, threshold)(x)
    torch.testing.assert_close(found, functional.linear(large, weight_OI, bias_O), atol=1e-5, rtol=1e-5)
    if threshold == 0:
        torch.testing.assert_close(found, functional.linear(x, weight_OI, bias_O), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2])
def test_picked_columns_sum_to_the_dense_product_in_every_dtype(dtype: torch.dtype, threads: int) -> None:
    weight_OI, bias_O = parts(33, 200)
    linear = thresholded(weight_OI, bias_O, 1.2).to(dtype)
    x = torch.randn(1, 1, 200, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert (x.abs() > 1.2).float().mean() < GATHER_BELOW, "this is the way that picks columns"
    dense = linear(torch.cat([x, x], 1))[:, :1]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        picked = linear(x)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(picked, dense, atol=1e-4 if dtype == torch.float32 else 0.2, rtol=0.02)


def test_spec_and_state_rebuild_it() -> None:
    linear = thresholded(*parts(6, 9), threshold=0.25)
    again = from_named_spec(named_spec(linear), torch.float32)
    again.load_state_dict(linear.state_dict(), strict=True)
    x = torch.randn(3, 9)
    assert torch.equal(again(x), linear(x))
    assert not linear.expression().is_linear, "no ordinary weight can say it"
    assert torch.equal(linear.dense_weight(), parts(6, 9)[0])


def test_what_it_left_out_is_counted() -> None:
    model = torch.nn.Sequential(thresholded(*parts(6, 4), threshold=1.0))
    with tallied(model) as counts:
        model(torch.tensor([[2.0, -3.0, 0.5, 1.0]]))
        model(torch.tensor([[0.1, 0.1, 0.1, 0.1], [9.0, 9.0, 9.0, 9.0]]))
    assert (counts["0"].active, counts["0"].total, counts["0"].calls) == (6, 12, 2)
