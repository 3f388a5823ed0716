from __future__ import annotations

import pytest
import torch

from llmcompress.numerics.sample import InputSample

CPU = torch.device("cpu")


@pytest.mark.parametrize("batches", [[5], [4000], [700, 700, 700], [1, 3000, 2, 2500, 4]])
def test_kept_tokens_are_evenly_spaced_over_all_that_came(batches: list[int]) -> None:
    numbers = torch.arange(sum(batches), dtype=torch.float32)[:, None]
    sample = InputSample(1, CPU)
    for batch in numbers.split(batches):
        sample.add(batch)
    kept = sample.rows_KI[:, 0]
    assert sample.tokens == len(numbers) and len(kept) <= InputSample.LIMIT
    assert len(kept) >= min(len(numbers), InputSample.LIMIT // 2)
    stride = 1 if len(kept) < 2 else int(kept[1] - kept[0])
    assert torch.equal(kept, numbers[::stride, 0])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_the_share_of_magnitudes_lies_at_or_below_the_threshold(share: float) -> None:
    sample = InputSample(7, CPU)
    x = torch.randn(311, 7, generator=torch.Generator().manual_seed(0))
    sample.add(x)
    left_out = (x.abs() <= sample.magnitude_below(share)).sum()
    assert int(left_out) == int(share * x.numel())


def test_a_sample_follows_a_fold_and_sees_what_is_not_finite() -> None:
    sample = InputSample(2, CPU)
    assert sample.magnitude_below(0.5) == 0.0, "no tokens"
    sample.add(torch.tensor([[2.0, 9.0]]))
    sample.rescale(torch.tensor([2.0, 3.0]))
    assert sample.rows_KI.tolist() == [[1.0, 3.0]] and sample.is_finite()
    sample.add(torch.tensor([[float("nan"), 0.0]]))
    assert not sample.is_finite()
