"""Codes that can be learned: each is drawn from the neighbours of a first one, with gradients. Any shape; float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

NEIGHBOURS = (-1.0, 0.0, 1.0)
"""Codes that a first code may become, less itself."""
_SURE = 0.3
"""Weights that a quantizer rounded away from their nearest code start between this and half a code: at the boundary
itself all of them would change at once."""
_BORDER = 0.499


def drawn_offset(latent: Tensor, sharpness: float, noise: tuple[Tensor, Tensor] | None) -> Tensor:
    """The mean offset from the first code: a softmax over -1, 0 and 1 with logits -sharpness · (latent - offset)².

    With `noise`, two tensors of `logistic_noise` that are added to the logits of +1 and -1 less that of 0, it is a
    sample of the Gumbel-Softmax distribution, up to the correlation of the two differences. Both tend to
    `round(latent)` as the sharpness grows.

    Source: Jang et al., arXiv 1611.01144; the neighbours arXiv 2604.18556 (GSQ). Differs: one latent position instead
    of a logit for every neighbour, a third of the memory; the temperature is part of the sharpness.
    """
    up, down = noise or (None, None)
    drawn: Tensor = _Drawn.apply(latent, sharpness, up, down)  # type: ignore[no-untyped-call]
    return drawn


def logistic_noise(count: int, generator: torch.Generator) -> Tensor:
    """What two Gumbel variables differ by, as often as asked for."""
    even = torch.rand(count, generator=generator).clamp_(1e-6, 1 - 1e-6)
    return torch.logit(even)


def first_position(residual: Tensor) -> Tensor:
    """Where between a code and its neighbours a weight begins that lies `residual` codes beside the code.

    Weights that the quantizer rounded away from their nearest code, to compensate other errors, would all start exactly
    on a rounding boundary and cross it in the same step: they are spread over the interval before it.
    """
    generator = torch.Generator().manual_seed(0)
    even = torch.rand(residual.shape, generator=generator).to(residual.device)
    before = residual.sign() * (_SURE + (_BORDER - _SURE) * even)
    return torch.where(residual.abs() < _BORDER, residual, before)


class _Drawn(torch.autograd.Function):
    """By hand, because the graph of the same lines would keep eight tensors of the weight's size instead of two."""

    @staticmethod
    @override
    def forward(ctx: Any, latent: Tensor, sharpness: float, up: Tensor | None, down: Tensor | None) -> Tensor:
        above, below = (_odds(latent * sign, sharpness, noise) for sign, noise in ((1, up), (-1, down)))
        whole = 1 + above + below
        above.div_(whole)
        below.div_(whole)
        ctx.save_for_backward(above, below)
        ctx.sharpness = sharpness
        return above - below

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        above, below = ctx.saved_tensors
        variance = above + below - (above - below).square()
        return gradients[0] * variance.mul_(2 * ctx.sharpness), None, None, None


def _odds(latent: Tensor, sharpness: float, noise: Tensor | None) -> Tensor:
    """Of the code above against the first one."""
    logit = latent * (2 * sharpness) - sharpness
    return (logit if noise is None else logit.add_(noise)).clamp_(max=40).exp_()
