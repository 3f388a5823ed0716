"""Codes drawn from the neighbours of a first one, beside the softmax that they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcompress.numerics.relaxed_codes import NEIGHBOURS, drawn_offset, logistic_noise


def softmax_offset(latent: Tensor, sharpness: float, up: Tensor | float, down: Tensor | float) -> Tensor:
    """As the formula says it; noise belongs to differences from the middle code."""
    offsets = torch.tensor(NEIGHBOURS, dtype=latent.dtype)
    logits = -sharpness * (latent[..., None] - offsets) ** 2
    logits = logits + torch.stack(
        torch.broadcast_tensors(torch.as_tensor(down), torch.zeros_like(latent), torch.as_tensor(up)), -1
    )
    return (logits.softmax(-1) * offsets).sum(-1)


def latents() -> Tensor:
    return torch.linspace(-1.49, 1.49, 61, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("sharpness", [0.5, 4.0, 20.0])
@pytest.mark.parametrize("noisy", [False, True])
def test_the_offset_and_its_gradient_are_those_of_the_softmax(sharpness: float, noisy: bool) -> None:
    ours, reference = latents(), latents()
    up, down = torch.randn(2, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    found = drawn_offset(ours, sharpness, (up, down) if noisy else None)
    wanted = softmax_offset(reference, sharpness, *((up, down) if noisy else (0.0, 0.0)))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    weights = torch.linspace(0.5, 2.0, 61, dtype=torch.float64)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-9, atol=1e-12)


def test_a_sharp_draw_without_noise_is_the_nearest_code() -> None:
    latent = latents().detach()
    assert torch.equal(drawn_offset(latent, 1e4, None).round(), latent.round().clamp(-1, 1))


def test_noise_has_the_distribution_of_a_difference_of_gumbels() -> None:
    found = logistic_noise(20_000, torch.Generator().manual_seed(0))
    for level in (-2.0, 0.0, 1.0):
        expected = torch.sigmoid(torch.tensor(level))
        assert float((found < level).double().mean()) == pytest.approx(float(expected), abs=0.015)
