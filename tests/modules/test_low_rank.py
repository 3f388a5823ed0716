"""Factored and corrected linears: the matrix they stand for, what they compute, and how they are built again."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from llmcompress.modules.base import CompressedModule, from_named_spec, named_spec
from llmcompress.modules.corrected import CorrectedLinear
from llmcompress.modules.low_rank import LowRankLinear, linear_of
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.ranges import fit


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(weight_OI: Tensor, bias_O: Tensor | None = None, scheme: str = "int4_g4") -> QuantLinear:
    known = named_scheme(scheme)
    fitted = fit(weight_OI, known.weights)
    return QuantLinear.from_fitted(known, round_to_codes(weight_OI, fitted), fitted, bias_O)


BIAS = random(6, seed=9)
MODULES: dict[str, CompressedModule] = {
    "factors": LowRankLinear.from_factors(random(6, 3), random(3, 10, seed=1), None),
    "factors, bias": LowRankLinear.from_factors(random(6, 3), random(3, 10, seed=1), BIAS),
    "quantized factors": LowRankLinear(quantized(random(3, 10)), quantized(random(6, 3), BIAS, "int3_channel_asym")),
    "corrected": CorrectedLinear(
        quantized(random(6, 10), BIAS), linear_of(random(3, 10), None), linear_of(random(6, 3), None)
    ),
    "corrected, quantized factors": CorrectedLinear(
        quantized(random(6, 10), scheme="int2_g5_asym"),
        quantized(random(3, 10), scheme="int8_channel"),
        quantized(random(6, 3)),
    ),
    "corrected, dense base": CorrectedLinear(
        linear_of(random(6, 10), BIAS), linear_of(random(3, 10), None), linear_of(random(6, 3), None)
    ),
}


@pytest.fixture(params=MODULES)
def module(request) -> CompressedModule:
    return MODULES[request.param]


def test_it_computes_what_the_matrix_it_stands_for_computes(module: CompressedModule) -> None:
    x = random(2, 5, 10, seed=3)
    expected = nn.functional.linear(x, module.dense_weight(), getattr(module, "bias", None))
    torch.testing.assert_close(module(x), expected)
    assert module.dense_weight().shape == (module.out_features, module.in_features) == (6, 10)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_spec_and_state_make_it_again(module: CompressedModule, device: str) -> None:
    spec = json.loads(json.dumps(named_spec(module)))
    before = torch.random.get_rng_state()
    with torch.device(device):
        again = from_named_spec(spec, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before), "building it moved the global generator"
    again.load_state_dict(module.state_dict(), strict=True, assign=True)
    x = random(4, 10)
    assert torch.equal(again(x), module(x))
    assert named_spec(again) == spec


def test_a_stock_loader_finds_an_empty_weight(module: CompressedModule) -> None:
    state = module.state_dict()
    assert state["weight"].shape == (0,)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(10, 6).load_state_dict(state, strict=False)


def test_the_dense_weight_has_the_dtype_of_the_parts(module: CompressedModule) -> None:
    assert copy.deepcopy(module).to(torch.bfloat16).dense_weight().dtype == torch.bfloat16


def test_parameters_of_factors_are_rank_times_outputs_plus_inputs() -> None:
    module = MODULES["factors, bias"]
    assert sum(p.numel() for p in module.parameters()) == 3 * (6 + 10) + 6
    assert all(p.requires_grad for p in module.parameters())


def test_left_factors_of_the_cpu_are_used_in_column_order_after_loading_too() -> None:
    left_OR, right_RI = torch.randn(12, 3), torch.randn(3, 8)
    made = LowRankLinear.from_factors(left_OR, right_RI, torch.randn(12))
    loaded = LowRankLinear.from_spec(made.spec(), torch.float32)
    loaded.load_state_dict({name: part.contiguous() for name, part in made.state_dict().items()}, assign=True)
    assert loaded.left.weight.is_contiguous()
    loaded.eval()
    x = torch.randn(2, 5, 8)
    for module in (made, loaded):
        assert module.left.weight.T.is_contiguous() and module.right.weight.is_contiguous()
    assert torch.equal(made(x), loaded(x))
    torch.testing.assert_close(made(x), x @ right_RI.T @ left_OR.T + made.left.bias)
