"""Losses of rows, a few at a time: values and gradients are those of all rows at once, and little is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from llmcompress.training import row_losses as module
from llmcompress.training.row_losses import row_losses

ROWS, WIDTH, VOCABULARY = 7, 5, 11
TARGETS_R = torch.arange(ROWS)
FACTORS_R = torch.linspace(-1, 2, ROWS, dtype=torch.float64)


@pytest.fixture(params=[1, 3, 100], ids=lambda rows: f"{rows} at once")
def at_once(request, monkeypatch) -> int:
    monkeypatch.setattr(module, "_BYTES", 4 * VOCABULARY * request.param)
    return -(-ROWS // min(request.param, ROWS))


def leaves() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (ROWS, WIDTH), (WIDTH, VOCABULARY)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)  # type: ignore[return-value]


def loss_of(some_RV: Tensor, rows: slice) -> Tensor:
    return functional.cross_entropy(some_RV, TARGETS_R[rows], reduction="none") ** 2


def test_values_and_gradients_are_those_of_all_rows_at_once(at_once: int) -> None:
    (x, w), (same_x, same_w) = leaves(), leaves()
    found_R, expected_R = row_losses(x @ w, loss_of), loss_of(same_x @ same_w, slice(None))
    torch.testing.assert_close(found_R, expected_R)
    (found_R * FACTORS_R).sum().backward()
    (expected_R * FACTORS_R).sum().backward()
    torch.testing.assert_close((x.grad, w.grad), (same_x.grad, same_w.grad))


def test_in_a_checkpoint_every_row_is_computed_once_more_and_no_more(at_once: int) -> None:
    (x, w), (same_x, same_w), asked = leaves(), leaves(), []

    def counted(some_RV: Tensor, rows: slice) -> Tensor:
        asked.append(rows)
        return loss_of(some_RV, rows)

    total = checkpoint(lambda given: row_losses(given @ w, counted).sum(), x, use_reentrant=False)
    total.backward()
    loss_of(same_x @ same_w, slice(None)).sum().backward()
    torch.testing.assert_close((x.grad, w.grad), (same_x.grad, same_w.grad))
    assert len(asked) == 2 * at_once


def test_only_the_gradient_is_kept(at_once: int) -> None:
    x, w = leaves()
    logits_RV = x @ w
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        row_losses(logits_RV, loss_of)
    assert [each.shape for each in kept] == [logits_RV.shape]


def test_without_gradients_nothing_is_kept(at_once: int) -> None:
    x, w = leaves()
    with torch.no_grad():
        found_R = row_losses(x @ w, loss_of)
    torch.testing.assert_close(found_R, loss_of(x @ w, slice(None)).detach())
    assert found_R.grad_fn is None


def test_no_row_has_no_loss_and_a_gradient_of_zeros(at_once: int) -> None:
    x, w = leaves()
    row_losses(x[:0] @ w, loss_of).sum().backward()
    assert w.grad is not None and not w.grad.any()
