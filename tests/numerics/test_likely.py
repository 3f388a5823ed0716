"""The quick search for the largest logits against sorting, and the normaliser against torch's."""

from __future__ import annotations

import pytest
import torch

from llmcompress.numerics.likely import best_tokens, log_sum_exp, top_tokens


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


def test_the_normaliser_holds_for_logits_whose_exponential_would_overflow() -> None:
    logits_RV = torch.randn(5, 300) * 100
    wanted_R = torch.logsumexp(logits_RV.double(), -1)
    found_R = log_sum_exp(logits_RV.clone(), logits_RV.amax(-1))
    torch.testing.assert_close(found_R.double(), wanted_R, rtol=1e-6, atol=1e-5)
