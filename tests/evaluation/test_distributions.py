"""Histograms of weights and inputs: every linear of a kind once, in the same bins before and after."""

from __future__ import annotations

import copy

import pytest
import torch

from llmcompress.evaluation.metrics.base import Subject
from llmcompress.evaluation.metrics.distributions import DistributionMetric
from llmcompress.evaluation.settings.distributions import Distributions
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.progress import Silent
from llmcompress.runners.torch_runner import TorchRunner
from tests.passes.decomposition.factored import block_pass, compressed
from tests.tiny_text import byte_tokenizer, tiny_llama


def metric() -> DistributionMetric:
    (found,) = DistributionMetric.prepare([Distributions()], Subject(byte_tokenizer(), 64, 259))
    return found


def weights_by_kind(model: torch.nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            kind = ".".join("*" if part.isdecimal() else part for part in name.split("."))
            found[kind] = found.get(kind, 0) + module.weight.numel()
    return found


def test_every_weight_of_every_linear_is_counted_once_and_zeros_are_told() -> None:
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:, ::2] = 0
    with TorchRunner(model) as runner:
        results = metric().results(metric().observe(runner, Silent(), dense=None), "model")
    weights = {each.sites: each for each in results if each.what == "weights"}
    assert {sites: sum(each.counts) + each.outside for sites, each in weights.items()} == weights_by_kind(model)
    assert {sites: each.zeros for sites, each in weights.items() if each.zeros} == {
        next(sites for sites in weights if sites.endswith("up_proj")): pytest.approx(0.5)
    }
    assert {each.sites for each in results if each.what == "activations"} == set(weights)


def test_the_compressed_model_has_the_bins_of_the_dense_one_and_is_multiplied_out_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = tiny_llama()
    rounded = copy.deepcopy(dense)
    with torch.no_grad():
        for layer in rounded.model.layers:
            layer.mlp.up_proj.weight.mul_(3)
    with TorchRunner(dense) as runner:
        before = metric().observe(runner, Silent(), dense=None)
    with TorchRunner(rounded) as runner:
        after = metric().observe(runner, Silent(), dense=before)
    pairs = list(zip(metric().results(before, "dense"), metric().results(after, "compressed"), strict=True))
    assert all((one.sites, one.low, one.high) == (other.sites, other.low, other.high) for one, other in pairs)
    assert any(other.outside > one.outside for one, other in pairs if one.sites.endswith("up_proj"))

    model, _ = compressed("llama_gqa", block_pass("rtn", scheme="int4_g16"))
    multiplied: list[int] = []
    plain = QuantLinear.dense_weight
    monkeypatch.setattr(QuantLinear, "dense_weight", lambda self: (multiplied.append(id(self)), plain(self))[1])
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: torch.nn.functional.linear(x, plain(self).to(x.dtype)))
    with TorchRunner(model) as runner:
        DistributionMetric(torch.arange(16)).observe(runner, Silent(), dense=None)
    assert len(multiplied) == len(set(multiplied)) == sum(isinstance(each, QuantLinear) for each in model.modules())
