"""Scales solved for again: never worse, equal to least squares where nothing is rounded, storable."""

import pytest
import torch
from torch import Tensor

from llmcompress.numerics.formats import E2M1
from llmcompress.numerics.grid import Fitted, Grid, restore, round_to_codes, row_errors
from llmcompress.numerics.ranges import fit
from llmcompress.numerics.scale_refinement import refine_scales


def problem(outputs: int, inputs: int, grid: Grid, seed: int = 0) -> tuple[Tensor, Tensor, Fitted, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    inputs_TI = torch.randn(3 * inputs, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    fitted = fit(weight, grid, scale_dtype=torch.bfloat16)
    return weight, round_to_codes(weight, fitted), fitted, inputs_TI.T @ inputs_TI


def errors(weight: Tensor, codes: Tensor, fitted: Fitted, gram: Tensor) -> Tensor:
    return row_errors(restore(codes, fitted) - weight, gram)


GRIDS = [Grid(2, True, 8), Grid(3, False, 8), Grid(3, True, None), Grid(4, True, 7), Grid.of(E2M1, 8)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 29), (16, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_no_row_gets_worse_and_scales_can_be_stored(grid: Grid, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, codes, fitted, gram = problem(*shape, grid)
    for sweeps in (0, 3):
        refined = refine_scales(weight, codes, fitted, gram, scale_dtype=dtype, sweeps=sweeps)
        assert (errors(weight, codes, refined, gram) <= errors(weight, codes, fitted, gram)).all()
        assert (refined.scale_OG * fitted.scale_OG > 0).all()
        kept = refined.scale_OG == fitted.scale_OG
        assert torch.equal(refined.scale_OG.to(dtype).float()[~kept], refined.scale_OG[~kept])
        assert torch.equal(refined.zero_OG, fitted.zero_OG)


def test_in_float32_the_scales_are_those_of_least_squares() -> None:
    weight, codes, fitted, gram = problem(6, 32, Grid(3, True, 8))
    refined = refine_scales(weight, codes, fitted, gram, sweeps=0)
    root = torch.linalg.cholesky(gram.double()).T
    for row in range(6):
        parts = [torch.where(torch.arange(32) // 8 == group, codes[row].double(), 0.0) for group in range(4)]
        system = root @ torch.stack(parts, 1)
        best = torch.linalg.lstsq(system, root @ weight[row].double()).solution
        torch.testing.assert_close(refined.scale_OG[row].double(), best, rtol=1e-3, atol=1e-4)


def test_rounding_inside_the_search_beats_rounding_its_result() -> None:
    weight, codes, fitted, gram = problem(64, 32, Grid(2, True, 8))
    lost = [
        float(
            errors(
                weight, codes, refine_scales(weight, codes, fitted, gram, scale_dtype=torch.bfloat16, sweeps=n), gram
            ).sum()
        )
        for n in (0, 4)
    ]
    assert lost[1] <= lost[0]


def test_rows_solved_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, codes, fitted, gram = problem(9, 32, Grid(3, True, 8))
    whole = refine_scales(weight, codes, fitted, gram)
    monkeypatch.setattr("llmcompress.numerics.scale_refinement._MOST_NUMBERS", 32)
    torch.testing.assert_close(
        refine_scales(weight, codes, fitted, gram).scale_OG, whole.scale_OG, rtol=1e-4, atol=1e-5
    )


def test_a_group_of_zero_codes_keeps_its_scale() -> None:
    weight, codes, fitted, gram = problem(2, 16, Grid(3, True, 8))
    codes[:, :8] = 0
    refined = refine_scales(weight, codes, fitted, gram)
    assert torch.equal(refined.scale_OG[:, 0], fitted.scale_OG[:, 0])
