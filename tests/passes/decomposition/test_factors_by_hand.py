"""Factors and ranks are those that the formulas give, put together by hand for the first block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmcompress.numerics.allocation import Option, spend
from llmcompress.numerics.low_rank import output_spectrum, truncate
from llmcompress.numerics.rank_allocation import Matrix, uniform_rank
from llmcompress.passes.decomposition import ranks as ranks_module
from tests.families import tiny_model
from tests.passes.decomposition.factored import block_pass, compressed, map_of, whole_model, windows

FAMILY = "llama"
RATIO = 0.3


def first_sites() -> list[str]:
    return [name for name in map_of(FAMILY).site_names() if ".layers.0." in name]


@torch.no_grad()
def inputs_of(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """What each linear reads on all windows, T×I."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    model(windows())
    return {name: torch.cat(each).flatten(0, -2) for name, each in seen.items()}


@pytest.mark.parametrize("alpha", [0.3, 1.2])
def test_activation_aware_factors_are_the_truncated_svd_of_the_scaled_weight(alpha: float) -> None:
    rank = 9
    chosen = block_pass("svd", rank=rank, whitening="activation", alpha=alpha, sites="*.layers.0.self_attn.[qkv]_proj")
    model, rows = compressed(FAMILY, chosen)
    dense = tiny_model(FAMILY, seed=1)
    assert len(rows) == 3
    for name, x_TI in inputs_of(dense, [row.site for row in rows]).items():
        scale_I = x_TI.abs().mean(0).double() ** alpha
        left, values, right = torch.linalg.svd(dense.get_submodule(name).weight.double() * scale_I)
        wanted = (left[:, :rank] * values[:rank]) @ right[:rank] / scale_I
        torch.testing.assert_close(model.get_submodule(name).dense_weight().double(), wanted, atol=1e-4, rtol=1e-3)


def test_ranks_by_loss_weigh_directions_by_the_squared_gradients_along_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A direction u of the output with energy e counts e · Σ uₒ² gₒ², gradients taken with uniform ranks."""
    names, model = first_sites(), tiny_model(FAMILY, seed=1)
    spectra, uniform = {}, {}
    for name, x_TI in inputs_of(model, names).items():
        weight = model.get_submodule(name).weight.detach()
        spectra[name] = output_spectrum(weight, x_TI.T @ x_TI)
        uniform[name] = uniform_rank(*weight.shape, 1 - RATIO, 1)
        model.get_submodule(name).weight.data = truncate(weight, spectra[name], uniform[name]).product()
    squares = squared_output_gradients(tiny_model(FAMILY, seed=1), {name: model.get_submodule(name) for name in names})
    ranks, options, budget = [], [], 0
    for name in names:
        felt_K = spectra[name].basis_OK.square().T @ squares[name].double()
        outputs, inputs = model.get_submodule(name).weight.shape
        found = Matrix(outputs, inputs, spectra[name].energy_K * felt_K).options()
        ranks.append([each.rank for each in found])
        options.append([Option(each.parameters, each.loss) for each in found])
        budget += uniform[name] * (outputs + inputs)
    wanted = {name: each[index] for name, each, index in zip(names, ranks, spend(options, budget), strict=True)}
    perplexities = iter([2.0, 1.0])  # uniform ranks would stay if the decided ones measured worse
    monkeypatch.setattr(ranks_module, "perplexity", lambda _: next(perplexities))
    decided = block_pass("svd", fraction=RATIO, ranks="loss", sites="*.layers.0.*").decide(whole_model(FAMILY))
    assert {name: int(rank) for name, rank in decided.items()} == wanted
    assert len(set(wanted.values())) > 2


def squared_output_gradients(model: Any, truncated: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Per output channel, over all tokens: of the loss of each token's own window."""
    sums: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        output.retain_grad()
        kept[name] = output

    for name, module in truncated.items():
        linear = model.get_submodule(name)
        linear.weight.data = module.get_parameter("weight").data
        linear.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        sums[name] = torch.zeros(linear.out_features)
    for ids in windows().split(1):
        model(ids, labels=ids).loss.backward()
        for name, output in kept.items():
            assert output.grad is not None
            sums[name] += output.grad.flatten(0, 1).square().sum(0)
    return sums
