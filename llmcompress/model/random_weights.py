"""Well-conditioned random weights in place of weights that are not loaded (meta tensors)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@torch.no_grad()
def materialise(module: nn.Module, *, skip: Sequence[nn.Module] = (), seed: int = 0) -> None:
    """Give every meta parameter and buffer below `module` float32 random values on the CPU; real ones stay.

    Modules below one in `skip` are left alone.
    Gains lie in 0.5–1.5, biases are non-zero, matrices N(0, 1/inputs): no channel is dead, no activation saturates,
    so every dependency that exists shows in an experiment.
    """
    generator = torch.Generator().manual_seed(seed)
    left_alone = {below for root in skip for below in root.modules()}
    for owner in module.modules():
        if owner in left_alone:
            continue
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                value = _random(owner, name, parameter.shape, generator)
                setattr(owner, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(owner, name, torch.zeros(buffer.shape, dtype=buffer.dtype))


def release(module: nn.Module) -> None:
    """Turn the parameters below `module` into meta tensors again and so free their memory."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            setattr(owner, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _random(owner: nn.Module, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if name == "weight" and len(shape) == 1:
        return torch.rand(shape, generator=generator) + 0.5
    noise = torch.randn(shape, generator=generator)
    if len(shape) < 2:
        return 0.3 * noise
    if isinstance(owner, nn.Embedding):
        return noise
    return noise / math.sqrt(shape[0] if isinstance(owner, Conv1D) else shape[-1])
