"""The loss of the next token, and how many windows have their logits at once."""

from __future__ import annotations

import math

import pytest
import torch

from llmcompress.numerics import loss
from llmcompress.numerics.loss import next_token_loss, windows_at_once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_mean_over_tokens_that_have_a_next_one_and_so_is_its_gradient(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    ids = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(1))
    found = next_token_loss(logits, ids)
    plain = logits.tolist()
    parts = [math.log(sum(map(math.exp, plain[b][t]))) - plain[b][t][ids[b, t + 1]] for b in range(3) for t in range(4)]
    assert float(found.detach()) == pytest.approx(sum(parts) / len(parts), rel=1e-5)
    (gradient,) = torch.autograd.grad(found, logits)
    expected = torch.softmax(logits.float(), -1) - torch.nn.functional.one_hot(ids.roll(-1, 1), 7)
    torch.testing.assert_close(gradient[:, :-1], (expected[:, :-1] / len(parts)).to(dtype))
    assert not gradient[:, -1].any()


def test_as_many_windows_as_their_logits_allow_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * 1000)
    assert windows_at_once(10, 30) == 3
    assert windows_at_once(10, 3000) == 1
