"""Fake quantization with gradients: straight-through estimators, learned step sizes and zero points.

O = outputs, I = inputs, G = groups of inputs, N = group length. Values equal those of `numerics/grid.py` bit for bit;
only gradients are approximated, because rounding has none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.numerics.formats import E4M3, POWER_OF_TWO, TWO_LEVEL, NumberFormat, power_of_two
from llmcompress.numerics.grid import Fitted, Grid, flat, grouped, of_groups

_NARROWEST = 2.0**-8
"""Of where it began: a trained scale that came nearer to zero would lose its sign, or divide by nothing."""


def straight_through(exact: Tensor, rounded: Tensor, inside: Tensor | None = None) -> Tensor:
    """`rounded`, bit for bit; its gradient goes to `exact` as it is, or only where `inside` is true.

    Source: Bengio et al., arXiv 1308.3432. Differs: `exact + (rounded - exact)`, as it is often written, is `rounded`
    up to the last bit only.
    """
    if not (torch.is_grad_enabled() and exact.requires_grad):
        return rounded
    passed: Tensor = _Passing.apply(exact, rounded.detach(), inside)  # type: ignore[no-untyped-call]
    return passed


def passing(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, whose gradient goes to `x` as if the function were not there."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return function(x)
    return straight_through(x, function(x.detach()))


def gradient_times(x: Tensor, factor: float) -> Tensor:
    """`x`, whose gradient is multiplied."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    scaled: Tensor = _Scaled.apply(x, factor)  # type: ignore[no-untyped-call]
    return scaled


def rounded_integers(values: Tensor, low: int, high: int, *, clip: bool = True) -> Tensor:
    """The nearest integers from `low` to `high`; with `clip` the gradient is 0 for values beyond, else 1 everywhere.

    A value within half a step of the outermost integer counts as inside.
    """
    near = values.detach().round().add_(0.0)  # -0 becomes 0: no code says it
    rounded = near.clamp(low, high)
    return straight_through(values, rounded, near == rounded if clip else None)


def rounded_numbers(values: Tensor, number: NumberFormat, *, clip: bool = True) -> Tensor:
    """The nearest values of a number format; gradients as for integers, half the outermost gap is inside."""
    exact = values.detach()
    lowest, highest = _reach(number)  # type: ignore[arg-type]
    inside = (exact >= lowest) & (exact <= highest) if clip else None
    return straight_through(values, number.nearest(exact), inside)


def fake_quantized(weight_OI: Tensor, fitted: Fitted, *, clip: bool = True) -> Tensor:
    """`restore(round_to_codes(weight_OI, fitted), fitted)`, with gradients for weights, scales and zero points.

    With v = w ÷ s + z and q its code: ∂/∂w is 1 inside the range and 0 outside; ∂/∂s is q - v inside and q - z outside;
    ∂/∂z is 0 inside and -s outside. All that follows from straight-through rounding alone, for number formats too;
    for integers it is written out, which keeps a byte for a code and one for its mask where autograd kept several
    matrices of floats. Scales may be negative.

    Source: Esser et al., arXiv 1902.08153 (LSQ); Bhalgat et al., arXiv 2004.09576 (LSQ+: zero points).
    Differs: weights up to half a step beyond the outermost code count as inside: the largest weight of a group lies on
    that code, and the last bit of a division would decide whether it has a gradient.
    """
    grid, inputs = fitted.grid, weight_OI.shape[1]
    scale_OG1, zero_OG1 = fitted.scale_OG[..., None], fitted.zero_OG[..., None]
    if grid.number is None and not grid.scales.minima:
        values_OI: Tensor = _OnIntegers.apply(weight_OI, fitted.scale_OG, fitted.zero_OG, grid, clip)  # type: ignore[no-untyped-call]
        return values_OI
    scaled_OGN = grouped(weight_OI, grid) / scale_OG1
    if grid.number is not None:
        return flat(rounded_numbers(scaled_OGN, grid.number, clip=clip) * scale_OG1, inputs)
    codes_OGN = rounded_integers(scaled_OGN + zero_OG1, grid.low, grid.high, clip=clip)
    return flat(_integers_restored(codes_OGN, fitted), inputs)


def restored(codes_OI: Tensor, fitted: Fitted) -> Tensor:
    """`restore(codes_OI, fitted)` with gradients for scales (q - z) and zero points (-s): the codes stay what they are.

    Source: Chen et al., arXiv 2407.11062 (EfficientQAT, end-to-end training of step sizes).
    """
    grid, inputs, dtype = fitted.grid, codes_OI.shape[1], fitted.scale_OG.dtype
    codes_OGN, scale_OG1 = grouped(codes_OI, grid), fitted.scale_OG[..., None]
    if grid.number is not None:
        return flat(grid.number.decode(codes_OGN, dtype) * scale_OG1, inputs)
    return flat(_integers_restored(codes_OGN.to(dtype), fitted), inputs)


def _integers_restored(codes_OGN: Tensor, fitted: Fitted) -> Tensor:
    grid, scale_OG = fitted.grid, fitted.scale_OG
    if not grid.scales.minima:
        return (codes_OGN - fitted.zero_OG[..., None]) * scale_OG[..., None]
    minimum_OG = straight_through((fitted.zero_OG - grid.low) * scale_OG, fitted.minimum_OG().detach())
    return (codes_OGN - grid.low) * scale_OG[..., None] - minimum_OG[..., None]


def step_gradient_factor(grid: Grid, outputs: int, inputs: int) -> float:
    """What the gradients of step sizes and zero points are multiplied by, so that they move as fast as weights do.

    1 ÷ √(weights under one scale · steps above zero). Source: Esser et al., arXiv 1902.08153, section 2.2.
    """
    weights = min(grid.length(inputs), inputs) * (outputs if grid.scales.single else 1)
    if grid.number is not None:
        steps: float = grid.number.reach
    else:
        steps = grid.high if grid.symmetric else grid.high - grid.low
    return float((weights * steps) ** -0.5)


def storable_zeros(zero_OG: Tensor, scale_OG: Tensor, grid: Grid, shared: Tensor | None) -> Tensor:
    """The nearest zero points, or zeros of the minima, that can be stored beside these scales; the gradient passes."""
    if not grid.scales.minima:
        return rounded_integers(zero_OG, grid.low, grid.high, clip=False)
    now = Fitted(grid, scale_OG.detach(), zero_OG.detach(), shared)
    stored = Fitted.of_stored(grid, now.stored_OG(), now.stored_zero_OG(), shared)
    return straight_through(zero_OG, stored.zero_OG)


def storable_scales(
    scale_OG: Tensor, first_OG: Tensor, grid: Grid, dtype: torch.dtype, shared: Tensor | None
) -> Tensor:
    """The nearest scales that can be stored, of the sign that `first_OG` had; the gradient passes.

    A scale that is where it began stays so to the bit, whatever it was.
    """
    kind, exact_OG, sign_OG = grid.scales, scale_OG.detach(), first_OG.sign()
    length_OG = torch.maximum(exact_OG * sign_OG, first_OG.abs() * _NARROWEST)
    if kind == POWER_OF_TWO:
        # the nearest by ratio, hence half-way at √2; a power of two itself stays far from every border
        near_OG = power_of_two(length_OG * 2**0.5, 0, dtype)
    elif kind.super_block is not None:
        assert shared is not None, "super-blocks share a scale"
        unit_OG = of_groups(shared[..., 0], grid, scale_OG.shape[1]) * sign_OG
        low_OG = torch.where(unit_OG > 0, 1, kind.integers[0])
        high_OG = torch.where(unit_OG > 0, kind.integers[1], -1)
        near_OG = (length_OG / unit_OG).round().clamp(low_OG, high_OG) * unit_OG
    elif kind == TWO_LEVEL:
        assert shared is not None, "two levels share a scale"
        near_OG = E4M3.nearest(length_OG * shared).clamp_min(2.0**-9) / shared
    else:
        near_OG = length_OG.to(dtype).to(length_OG.dtype)
    near_OG = near_OG * sign_OG
    return straight_through(scale_OG, torch.where((exact_OG == first_OG) | (near_OG == 0), first_OG, near_OG))


@cache
def _reach(number: NumberFormat) -> tuple[float, float]:
    """The outermost values, half of the last gap farther out."""
    codes = torch.arange(number.low, number.low + (1 << number.bits)).to(torch.int8)
    values = number.decode(codes, torch.float64)
    rising = sorted(set(values[values.isfinite()].tolist()))
    return rising[0] - (rising[1] - rising[0]) / 2, rising[-1] + (rising[-1] - rising[-2]) / 2


class _Passing(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, exact: Tensor, rounded: Tensor, inside: Tensor | None) -> Tensor:
        if inside is not None:
            ctx.save_for_backward(inside)
        return rounded

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), kept = gradients, ctx.saved_tensors  # asked for once: checkpointing recomputes them
        return (gradient * kept[0] if kept else gradient), None, None


class _OnIntegers(torch.autograd.Function):
    """`fake_quantized` for integers with scales and zero points."""

    @staticmethod
    @override
    def forward(ctx: Any, weight_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, grid: Grid, clip: bool) -> Tensor:
        scale_OG1, zero_OG1 = scale_OG[..., None], zero_OG[..., None]
        near_OGN = (grouped(weight_OI, grid) / scale_OG1).add_(zero_OG1).round_().add_(0.0)  # -0 becomes 0
        codes_OGN = near_OGN.clamp(grid.low, grid.high)
        inside_OGN = codes_OGN == near_OGN if clip else None
        narrow = torch.int8 if grid.low >= -128 and grid.high <= 127 else torch.int16
        ctx.save_for_backward(weight_OI, scale_OG, zero_OG, codes_OGN.to(narrow), inside_OGN)
        ctx.grid = grid
        return flat(codes_OGN.sub_(zero_OG1).mul_(scale_OG1), weight_OI.shape[1])

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        weight_OI, scale_OG, zero_OG, codes_OGN, inside_OGN = ctx.saved_tensors
        gradient_OGN, of_weight, of_scale, of_zero = grouped(gradients[0], ctx.grid), None, None, None
        if ctx.needs_input_grad[0]:
            passed_OGN = gradient_OGN if inside_OGN is None else gradient_OGN * inside_OGN
            of_weight = flat(passed_OGN, weight_OI.shape[1])
        if ctx.needs_input_grad[1]:
            # inside q - v, outside q - z, with v = w ÷ s + z
            slope_OGN = grouped(weight_OI.detach(), ctx.grid) / scale_OG[..., None]
            if inside_OGN is not None:
                slope_OGN.mul_(inside_OGN)
            slope_OGN = slope_OGN.neg_().add_(codes_OGN).sub_(zero_OG[..., None])
            of_scale = slope_OGN.mul_(gradient_OGN).sum(-1)
        if ctx.needs_input_grad[2]:
            outside = torch.zeros_like(zero_OG) if inside_OGN is None else (gradient_OGN * ~inside_OGN).sum(-1)
            of_zero = outside * -scale_OG
        return of_weight, of_scale, of_zero, None, None


class _Scaled(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient * ctx.factor, None
