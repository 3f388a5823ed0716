"""Repairing what a mask kept, against solving every row by itself."""

import pytest
import torch
from torch import Tensor

from llmcompress.numerics.grid import output_error
from llmcompress.numerics.repair import repair_kept
from tests.numerics.test_columns import problem


def masked(outputs: int, inputs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    weight, gram = problem(outputs, inputs, seed)
    kept = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed)) < 0.5
    return weight, kept, gram


def best(weight: Tensor, kept: Tensor, gram: Tensor) -> Tensor:
    """Each row's least squares over its kept inputs, one solve after another."""
    found = torch.zeros_like(weight)
    for row, (weight_I, kept_I) in enumerate(zip(weight, kept, strict=True)):
        places = kept_I.nonzero().flatten()
        if len(places):
            found[row, places] = torch.linalg.solve(gram[places][:, places], gram[places] @ weight_I)
    return found


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (13, 11), (8, 32)], ids=str)
def test_enough_steps_reach_the_least_squares_of_every_row(shape: tuple[int, int]) -> None:
    weight, kept, gram = masked(*shape, seed=1)
    repaired = repair_kept(weight, weight * kept, kept, gram, steps=400)
    torch.testing.assert_close(repaired.weight_OI, best(weight, kept, gram), atol=1e-5, rtol=1e-4)
    assert (repaired.weight_OI[~kept] == 0).all()


def test_no_step_makes_any_row_worse_and_the_error_is_the_true_one() -> None:
    weight, kept, gram = masked(13, 31, seed=2)
    start = weight * kept * 1.3
    before = torch.full((13,), torch.inf, dtype=torch.float64)
    for steps in range(8):
        repaired = repair_kept(weight, start, kept, gram, steps=steps)
        difference = repaired.weight_OI - weight
        rows = ((difference @ gram) * difference).sum(1)
        assert (rows <= before * (1 + 1e-9)).all()
        assert repaired.error == pytest.approx(float(output_error(difference, gram)), rel=1e-9)
        before = rows
    assert torch.equal(repair_kept(weight, start, kept, gram, steps=0).weight_OI, start)


def test_inputs_that_were_never_seen_and_rows_without_weights_stay() -> None:
    weight, kept, gram = masked(4, 8, seed=3)
    gram[3], gram[:, 3] = 0, 0
    kept[2] = False
    kept[:, 3] = True
    repaired = repair_kept(weight, weight * kept, kept, gram, steps=20).weight_OI
    torch.testing.assert_close(repaired[:, 3], weight[:, 3])
    assert (repaired[2, :3] == 0).all() and torch.isfinite(repaired).all()
    whole = repair_kept(weight, weight, torch.ones_like(kept), gram, steps=5)
    assert torch.equal(whole.weight_OI, weight) and whole.error == 0
