"""Which device a run computes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llmcompress.errors import CompressError

_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Instructions of processors for products in bfloat16, as torch calls them; the last two are those of ARM."""


def multiplies_in_bfloat16(device: torch.device) -> bool:
    """Whether it has instructions for that; False where torch cannot tell (older ones, of processors)."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return any(found.get(name, False) for name in _BFLOAT16)


def usable_device(name: str) -> torch.device:
    """`auto`: the GPU where there is one.

    Raises: CompressError when the device does not exist or cannot hold a tensor.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise CompressError(
            "device.unusable",
            f"the device {name!r} cannot be used: {str(problem).splitlines()[0]}",
            fix="set `device` to auto, cpu or cuda",
        ) from None
    if device.type == "meta":
        what = "the device 'meta' cannot be used: its tensors have no values"
        raise CompressError("device.unusable", what, fix="set `device` to auto, cpu or cuda")
    return device
