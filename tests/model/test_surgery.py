"""Folding keeps a block's function, exactly where it can be exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmcompress.errors import CompressError
from llmcompress.model.map import Fold
from llmcompress.model.surgery import apply_fold, fold_factors_ok

WIDTH = 16
FOLD = Fold("norm", True, ("a", "b"), tuple(range(WIDTH)))


class OnePlusNorm(nn.Module):
    """Gain 1 + weight, as in Gemma."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH))

    def forward(self, x):
        return nn.functional.rms_norm(x, (WIDTH,)) * (1 + self.weight)


class Toy(nn.Module):
    def __init__(self, norm, consumer=nn.Linear):
        super().__init__()
        self.norm, self.a, self.b = norm, consumer(WIDTH, 5), consumer(WIDTH, 7)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x):
        return torch.cat([self.a(self.norm(x)), self.b(self.norm(x))], -1)


def conv1d(inputs, outputs):
    return Conv1D(outputs, inputs)


def factors(seed=1):
    return torch.rand(WIDTH, generator=torch.Generator().manual_seed(seed)) * 4 + 0.2


def inputs():
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("consumer", [nn.Linear, conv1d])
@pytest.mark.parametrize(
    ("norm", "offset"), [(nn.LayerNorm(WIDTH), 0.0), (nn.RMSNorm(WIDTH), 0.0), (OnePlusNorm(), 1.0)]
)
def test_norm_folds_keep_the_function(norm, offset, consumer):
    toy = Toy(norm, consumer).double()
    before = toy(inputs())
    gain = toy.norm.weight.clone() + offset
    apply_fold(toy, Fold("norm", True, ("a", "b"), FOLD.channel_map, offset), factors())
    torch.testing.assert_close(toy.norm.weight + offset, gain / factors())
    torch.testing.assert_close(toy(inputs()), before, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(("norm", "offset"), [(nn.RMSNorm(WIDTH), 0.0), (OnePlusNorm(), 1.0)])
def test_rounding_a_gain_to_bfloat16_loses_nothing(norm, offset):
    toy = Toy(norm)
    toy.norm.weight.data = toy.norm.weight.bfloat16().float()
    toy.double()
    before = toy(inputs())
    fold = Fold("norm", True, ("a", "b"), FOLD.channel_map, offset)
    apply_fold(toy, fold, factors(), storage_dtype=torch.bfloat16)
    assert torch.equal(toy.norm.weight, toy.norm.weight.bfloat16().double())
    torch.testing.assert_close(toy(inputs()), before, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_with_a_bias_only_the_rounding_of_the_bias_remains():
    toy = Toy(nn.LayerNorm(WIDTH)).double()
    gain, bias = toy.norm.weight.clone(), toy.norm.bias.clone()
    columns = toy.a.weight.clone()
    apply_fold(toy, FOLD, factors(), storage_dtype=torch.bfloat16)
    ratio = toy.a.weight[0] / columns[0]
    torch.testing.assert_close(toy.norm.weight * ratio, gain, rtol=1e-12, atol=0)
    torch.testing.assert_close(toy.norm.bias * ratio, bias, rtol=2**-8, atol=0)


@torch.no_grad()
def test_channels_whose_gain_is_zero_keep_their_bias():
    toy = Toy(nn.LayerNorm(WIDTH)).double()
    toy.norm.weight[3] = 0
    toy.norm.weight[4] = toy.norm.bias[4] = 0
    toy.norm.weight.copy_(toy.norm.weight.bfloat16())
    only = torch.ones(WIDTH)
    only[3:5] = torch.tensor([2.7, 3.3])
    before = toy(inputs())
    apply_fold(toy, FOLD, only, storage_dtype=torch.bfloat16)
    toy.norm.bias[[c for c in range(WIDTH) if c not in (3, 4)]] = Toy(nn.LayerNorm(WIDTH)).norm.bias.double()[
        [c for c in range(WIDTH) if c not in (3, 4)]
    ]
    torch.testing.assert_close(toy(inputs()), before, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_gain_that_would_round_to_zero_stays():
    toy = Toy(nn.RMSNorm(WIDTH)).double()
    before = toy(inputs())
    apply_fold(toy, FOLD, torch.full((WIDTH,), 1e60, dtype=torch.float64), storage_dtype=torch.float16)
    torch.testing.assert_close(toy(inputs()), before)


@torch.no_grad()
@pytest.mark.parametrize("linear", [nn.Linear, conv1d])
def test_linear_folds_follow_the_channel_map(linear):
    block = nn.ModuleDict({"v": linear(4, 6), "o": linear(8, 3)}).double()
    channel_map = (2, 3, 2, 3, 4, 5, 4, 5)  # two query heads per value head; rows 0 and 1 belong to something else
    x = torch.randn(5, 4, dtype=torch.float64)

    def run():
        v = block["v"](x)
        return v, block["o"](v[:, list(channel_map)])

    v, before = run()
    divide = torch.tensor([1.0, 1.0, 2.0, 3.0, 0.5, 0.7], dtype=torch.float64)
    apply_fold(block, Fold("v", False, ("o",), channel_map), divide)
    after_v, after = run()
    torch.testing.assert_close(after_v, v / divide)
    torch.testing.assert_close(after, before)


@torch.no_grad()
def test_powers_of_two_are_exact_in_bfloat16():
    toy = Toy(nn.LayerNorm(WIDTH)).bfloat16()
    before = toy(inputs().bfloat16())
    apply_fold(toy, FOLD, 2.0 ** torch.arange(-8, 8))
    assert torch.equal(toy(inputs().bfloat16()), before)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_factors_are_refused_and_nothing_changes(bad):
    toy = Toy(nn.RMSNorm(WIDTH))
    before = {k: v.clone() for k, v in toy.state_dict().items()}
    wrong = torch.ones(WIDTH)
    wrong[2] = bad
    with pytest.raises(CompressError, match=r"fold\.bad-factors"):
        apply_fold(toy, FOLD, wrong)
    assert all(torch.equal(value, before[key]) for key, value in toy.state_dict().items())


def test_factors_on_channels_that_nobody_reads_are_refused():
    fold = Fold("qkv", False, ("o",), (4, 5))
    assert fold_factors_ok(fold, torch.tensor([1.0, 1, 1, 1, 2, 3]))
    assert not fold_factors_ok(fold, torch.tensor([2.0, 1, 1, 1, 2, 3]))
    assert not fold_factors_ok(fold, torch.tensor([1.0, 1, 1]))
