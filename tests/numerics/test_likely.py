"""The quick search for the largest logits, against sorting."""

from __future__ import annotations

import pytest
import torch

from llmcompress.numerics.likely import best_tokens, top_tokens


@pytest.mark.parametrize("vocabulary", [5, 64, 259, 1003, 4096])
@pytest.mark.parametrize("count", [1, 5, 64])
def test_the_largest_logits_and_their_columns_equal_a_whole_sort(vocabulary: int, count: int) -> None:
    random = torch.Generator().manual_seed(vocabulary)
    logits_RV = torch.stack([torch.randperm(vocabulary, generator=random) for _ in range(7)]).float()
    values_RK, columns_RK = top_tokens(logits_RV, count)
    whole = logits_RV.sort(-1, descending=True)
    assert torch.equal(values_RK, whole.values[:, :count]) and torch.equal(columns_RK, whole.indices[:, :count])
    values_R, columns_R = best_tokens(logits_RV)
    assert torch.equal(values_R, whole.values[:, 0]) and torch.equal(columns_R, whole.indices[:, 0])


def test_equal_logits_are_found_as_often_as_they_are() -> None:
    logits_RV = torch.zeros(3, 1000)
    logits_RV[:, 100:150] = 1.0
    values_RK, columns_RK = top_tokens(logits_RV, 64)
    assert torch.equal(values_RK.sum(-1), torch.full((3,), 50.0))
    assert all(len(set(row)) == 64 and set(range(100, 150)) < set(row) for row in columns_RK.tolist())
