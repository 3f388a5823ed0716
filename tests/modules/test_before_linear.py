"""What happens before a linear: the same function, described by plain data, multiplied out where that can be."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor

from llmcompress.modules.base import CompressedModule, from_named_spec, named_spec
from llmcompress.modules.low_rank import linear_of
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.scheme import named_scheme
from llmcompress.modules.transformed_input import ClusteredInput, RotatedInput, unwrapped
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.hadamard import transformed
from llmcompress.numerics.ranges import fit


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotated(inputs: int, *, bias: bool) -> tuple[RotatedInput, Tensor, Tensor | None]:
    weight, bias_O = random(5, inputs), random(5, seed=1) if bias else None
    return RotatedInput(linear_of(transformed(weight, inputs), bias_O)), weight, bias_O


def clustered(bits: int | None, *, gathers: bool) -> tuple[ClusteredInput, Tensor]:
    weight, order = random(5, 8), torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    kept = weight[:, order] if gathers else weight
    module = ClusteredInput(
        linear_of(kept.contiguous(), None),
        sizes=(3, 5),
        bits=bits,
        scale_K=torch.tensor([0.01, 0.02]),
        zero_K=torch.tensor([400, 300], dtype=torch.int32),
        index_I=order if gathers else None,
    )
    return module, weight


@pytest.mark.parametrize("inputs", [1, 7, 12, 64, 96])
@pytest.mark.parametrize("bias", [True, False])
def test_an_online_rotation_computes_what_the_linear_did(inputs, bias):
    module, weight, bias_O = rotated(inputs, bias=bias)
    x = random(2, 3, inputs, seed=2)
    torch.testing.assert_close(module(x), torch.nn.functional.linear(x, weight, bias_O), rtol=0, atol=1e-5)
    torch.testing.assert_close(module.dense_weight(), weight, rtol=0, atol=1e-5)
    assert module.expression().is_linear and (module.dense_bias() is None) == (bias_O is None)


def test_gathering_computes_what_the_linear_did_and_rounding_comes_near():
    x = random(2, 3, 8, seed=2)
    for gathers in (True, False):
        module, weight = clustered(None, gathers=gathers)
        torch.testing.assert_close(module(x), x @ weight.T)
        torch.testing.assert_close(module.dense_weight(), weight)
        assert module.expression().is_linear
        rounding, _ = clustered(8, gathers=gathers)
        assert not rounding.expression().is_linear
        assert not torch.equal(rounding(x), module(x))


@pytest.mark.parametrize("form", ["rotated", "gathers", "in place"])
@pytest.mark.parametrize("codes", [True, False])
def test_spec_and_tensors_make_it_again(form, codes):
    module: CompressedModule = (
        rotated(8, bias=True)[0] if form == "rotated" else clustered(4, gathers=form == "gathers")[0]
    )
    if codes:
        scheme, weight = named_scheme("int4_channel"), module.kept.weight.detach()
        fitted = fit(weight, scheme.weights)
        module.kept = QuantLinear.from_fitted(scheme, round_to_codes(weight, fitted), fitted, None)
    spec = json.loads(json.dumps(named_spec(module)))
    again = from_named_spec(spec, torch.float32)
    again.load_state_dict(module.state_dict(), strict=True)
    x = random(4, 8, seed=5)
    assert torch.equal(again(x), module(x))
    assert named_spec(again) == spec
    assert unwrapped(again) is again.kept
    assert module.state_dict()["weight"].shape == (0,), "a loader without us must fail"
    with torch.device("meta"):
        assert from_named_spec(spec, torch.bfloat16)(x.to("meta").bfloat16()).shape == (4, 5)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
