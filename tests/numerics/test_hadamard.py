"""Spreading matrices: orthogonal, flat, with a constant first row, applied factor by factor as if multiplied out."""

from __future__ import annotations

import pytest
import torch

from llmcompress.numerics.basis import zero_mean_frame
from llmcompress.numerics.hadamard import hadamard, hadamard_factors, spreading_basis, transformed, uniform_basis

WIDTHS = (1, 2, 3, 7, 8, 12, 20, 36, 42, 63, 64, 75, 96, 97, 256, 344)
FLAT = (1, 2, 8, 12, 20, 24, 28, 36, 64, 76, 96, 112, 256, 1024)
"""A Hadamard matrix: powers of two, Paley's 12, 20, 24, 28 (3 modulo 4) and 36, 76 (1 modulo 4), and products."""


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_orthogonal_and_its_first_row_is_constant(width):
    matrix = hadamard(width)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix[0], torch.full((width,), width**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("width", FLAT)
def test_all_entries_have_one_magnitude_where_a_hadamard_matrix_is_known(width):
    torch.testing.assert_close(hadamard(width).abs(), torch.full((width, width), width**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("width", WIDTHS)
def test_no_entry_is_larger_than_twice_the_flat_one(width):
    assert float(hadamard(width).abs().max()) <= 2**0.5 * width**-0.5 + 1e-12


@pytest.mark.parametrize("width", WIDTHS)
def test_factor_by_factor_equals_the_whole_matrix(width):
    x = torch.randn(3, 5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(transformed(x, width), x @ hadamard(width).T, rtol=0, atol=1e-12)
    torch.testing.assert_close(transformed(transformed(x, width), width, inverse=True), x, rtol=0, atol=1e-12)
    assert transformed(x.bfloat16(), width).dtype == torch.bfloat16


def test_factors_of_large_widths_are_small():
    assert [len(factor) for factor in hadamard_factors(4096)] == [64, 64]
    assert (
        max(len(factor) for factor in hadamard_factors(11008)) == 43
    )  # 2⁸ · 43: no Hadamard matrix of 43 · 4 is Paley's
    assert max(len(factor) for factor in hadamard_factors(14336)) <= 64


@pytest.mark.parametrize("basis", [spreading_basis, uniform_basis])
@pytest.mark.parametrize("width", [2, 7, 12, 42, 64])
def test_bases_are_orthonormal_and_keep_the_mean_where_they_must(basis, width):
    for centred in (False, True):
        kept_DK = basis(width, torch.Generator().manual_seed(0), centred=centred)
        kept = width - int(centred)
        torch.testing.assert_close(kept_DK.T @ kept_DK, torch.eye(kept, dtype=torch.float64), rtol=0, atol=1e-12)
        if centred:
            assert kept_DK.mean(0).abs().max() < 1e-12
            whole_DD = kept_DK @ zero_mean_frame(width)
            if basis is spreading_basis and width == 64:
                assert float(whole_DD.abs().max()) < 3 * width**-0.5  # no channel stays alone
