"""What a norm computes, found by running it: LayerNorm or RMSNorm, the offset of its gain, its epsilon. D = width."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class NormForm:
    """`(x - mean) / sqrt(mean square + epsilon) * (offset + weight) + bias`, the mean only where it is `centred`."""

    centred: bool
    offset: float
    """1 where the gain is 1 + weight (Gemma), otherwise 0."""
    epsilon: float

    def unit(self, x: Tensor) -> Tensor:
        """The norm without gain and bias."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x * (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()


def gain_and_bias(norm: nn.Module, form: NormForm, width: int) -> tuple[Tensor, Tensor]:
    """What a norm multiplies every channel by and adds to it, in float64."""
    weight, bias = (getattr(norm, key, None) for key in ("weight", "bias"))
    gain_D = torch.ones(width, dtype=torch.float64) if weight is None else weight.detach().double() + form.offset
    return gain_D, torch.zeros(width, dtype=torch.float64) if bias is None else bias.detach().double()


@torch.no_grad()
def norm_form(norm: nn.Module, width: int) -> NormForm | None:
    """The form of a norm on the CPU in float32; None where it computes something else."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, width, generator=generator) + torch.randn(4, 1, generator=generator)
    for centred, offset in product((True, False), (0.0, 1.0)):
        form = NormForm(centred, offset, _epsilon(norm, NormForm(centred, offset, 0.0), width))
        gain_D, bias_D = gain_and_bias(norm, form, width)
        if all(_near(norm(x * size), form.unit(x * size) * gain_D.float() + bias_D.float()) for size in (1.0, 3e-3)):
            return form
    return None


@torch.no_grad()
def normalises(norm: nn.Module, x: Tensor, output: Tensor, width: int) -> bool:
    """Whether a leaf module gives the same for an input four times as long."""
    if x.shape != output.shape or x.shape[-1] != width or not x.is_floating_point():
        return False
    longer = norm(4 * x)
    return not torch.equal(output, 0 * output) and _near(longer, output, 1e-3)


def _epsilon(norm: nn.Module, form: NormForm, width: int) -> float:
    """Measured on a short input; the number that the module notes, where one is that close."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, width, generator=generator)
    x = form.unit(x) * 3e-3
    gain_D, bias_D = gain_and_bias(norm, form, width)
    unit_D = (norm(x)[0].double() - bias_D) / gain_D
    kept = gain_D.abs() > 0.1
    ratio = float((unit_D[kept] * x[0, kept].double()).sum() / x[0, kept].double().square().sum())
    square = float(x.double().square().mean())
    measured = 1 / ratio**2 - square if ratio > 0 else math.nan
    noted = [value for value in vars(norm).values() if isinstance(value, float) and 0 < value < 1e-2]
    return next((value for value in noted if abs(value - measured) <= 1e-2 * value + 1e-4 * square), max(measured, 0.0))


def _near(one: Tensor, other: Tensor, relative: float = 1e-4) -> bool:
    return bool((one - other).abs().max() <= relative * other.abs().max())
