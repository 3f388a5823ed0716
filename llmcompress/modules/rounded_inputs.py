"""Quantizes activations before a linear, with the arithmetic of compressed-tensors.

A model loaded by stock transformers therefore gives the logits measured here. N = inputs that share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.fake_quant import passing
from llmcompress.numerics.formats import E2M1, E4M3, NumberFormat, shared_scale

_INT8_REACH = 127.5
"""Half the 255 steps between -128 and 127."""


def round_inputs(x: Tensor, scheme: Scheme, scale: Tensor | None) -> Tensor:
    """There and back through the format that a scheme gives its inputs; `scale` is what calibration fixed.

    The gradient passes as if nothing were rounded, also where a fixed scale clips.
    """
    return passing(lambda exact: _rounded(exact, scheme, scale), x)


def _rounded(x: Tensor, scheme: Scheme, scale: Tensor | None) -> Tensor:
    if scheme.activations == "group":
        return _round_groups(x, scheme, scale)
    return round_activations(x, scale, scheme.weights.number)


def round_activations(x: Tensor, scale: Tensor | None, number: NumberFormat | None = None) -> Tensor:
    """Round trip through int8 (or an 8-bit float): per token when `scale` is None, else with that one scale.

    For int8 the scale is the largest magnitude ÷ 127.5 and codes are -128 … 127.
    """
    if scale is None:
        scale = x.abs().amax(-1, keepdim=True) / (number.reach if number else _INT8_REACH)
        scale = torch.where(scale == 0, torch.full_like(scale, torch.finfo(scale.dtype).eps), scale)
    if number is not None:
        return number.nearest(x / scale) * scale
    return (x / scale).clamp_(-128, 127).round_() * scale


def fixed_scale(largest: Tensor, scheme: Scheme) -> Tensor:
    """From the largest input seen: the one scale of static activations, or what dynamic ones of NVFP4 share."""
    if scheme.activations == "group":
        return shared_scale(largest, E2M1)
    number = scheme.weights.number
    return largest.reshape(1) / (number.reach if number else _INT8_REACH)


def _round_groups(x: Tensor, scheme: Scheme, shared: Tensor | None) -> Tensor:
    number, length = scheme.weights.number, scheme.weights.group
    assert number is not None and length is not None, "only MX and NVFP4 round activations in groups"
    inputs = x.shape[-1]
    grouped_N = functional.pad(x, (0, -inputs % length)).reshape(*x.shape[:-1], -1, length)
    largest = grouped_N.abs().amax(-1, keepdim=True)
    if shared is None:
        scale = _power_of_two(largest, number)
    else:
        local = E4M3.nearest(shared * (largest / number.reach))
        scale = torch.where(local == 0, torch.full_like(local, 0.125), local) / shared
    rounded_N = number.nearest(grouped_N / scale) * scale
    return rounded_N.flatten(-2)[..., :inputs].to(x.dtype)


def _power_of_two(largest: Tensor, number: NumberFormat) -> Tensor:
    """A largest magnitude of 1.75 · 2^e and more takes the next exponent: it would be clipped far otherwise.

    Differs: the OCP specification, and our weights, always round the exponent down.
    """
    mantissa, exponent = torch.frexp(largest)
    power = exponent - 1 + (mantissa >= 0.875).int() - number.exponent
    return torch.ldexp(torch.ones_like(largest), power.clamp(-126, 127))
