"""Synaptic flow: equal to the product of matrices where there is nothing else, and conserved along every branch."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.numerics.synflow import Branch, Factor, synflow_scores

D, U = 6, 5


def gated(seed: int) -> tuple[tuple[tuple[Branch, ...], ...], dict[str, Tensor]]:
    """up and gate of U rows, down of U columns."""
    generator = torch.Generator().manual_seed(seed)
    each = torch.arange(U)
    branch = Branch("up", each, each, U, (Factor("gate", each),), "down")
    weights = {
        "up": torch.randn(U, D, generator=generator).double(),
        "gate": torch.randn(U, D, generator=generator).double(),
        "down": torch.randn(D, U, generator=generator).double(),
    }
    return ((branch,),), weights


def test_a_branch_of_two_linears_loses_what_the_textbook_product_loses() -> None:
    """R = 1ᵀ |B| |A| 1 through one branch without gates; a score is the share of R that is lost without the weight."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a": torch.randn(U, D, generator=generator).double(),
        "b": torch.randn(D, U, generator=generator).double(),
    }
    branch = Branch("a", torch.arange(U), torch.full((U,), -1), 0, (), "b")
    [found] = synflow_scores(D, [((branch,),)], [weights])

    def total(a: Tensor, b: Tensor) -> Tensor:
        return (b.abs() @ a.abs()).sum()

    for name in ("a", "b"):
        for index in [(0, 0), (2, 3), (4, 4)]:
            up = {key: each.clone() for key, each in weights.items()}
            up[name][index] = 0
            expected = 1 - total(up["a"], up["b"]) / total(weights["a"], weights["b"])
            torch.testing.assert_close(found[name][index], expected, atol=1e-10, rtol=1e-10)


def test_every_linear_of_a_deep_network_has_the_same_sum_of_scores() -> None:
    blocks, weights = zip(*(gated(seed) for seed in range(60)), strict=True)
    scores = synflow_scores(D, blocks, weights)
    for block in scores:
        sums = torch.stack([each.sum() for each in block.values()])
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-9, atol=0)


def test_a_unit_whose_gate_is_gone_lets_nothing_through() -> None:
    blocks, weights = gated(1)
    weights["gate"][2] = 0
    [scores] = synflow_scores(D, [blocks], [weights])
    assert (scores["up"][2] == 0).all() and (scores["down"][:, 2] == 0).all()
    assert (scores["up"][[0, 1, 3, 4]] > 0).all()


def test_signs_and_a_global_factor_change_no_order() -> None:
    blocks, weights = gated(2)
    [scores] = synflow_scores(D, [blocks], [weights])
    [flipped] = synflow_scores(D, [blocks], [{name: -each for name, each in weights.items()}])
    for name in scores:
        assert torch.equal(scores[name], flipped[name])


def test_what_has_no_place_is_scored_by_its_size() -> None:
    alone = Branch("x", torch.arange(3), torch.full((3,), -1), 0, (), None)
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.0], [0.5, 4.0]]).double()
    [scores] = synflow_scores(2, [((alone,),)], [{"x": weight}])
    torch.testing.assert_close(scores["x"], weight.abs() / weight.abs().sum())
    [other_width] = synflow_scores(7, [((alone,),)], [{"x": weight}])
    torch.testing.assert_close(other_width["x"], weight.abs() / weight.abs().sum())
