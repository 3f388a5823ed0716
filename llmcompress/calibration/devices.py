"""Which device a run computes on."""

from __future__ import annotations

import torch

from llmcompress.errors import CompressError


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
