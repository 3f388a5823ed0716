"""Masks as saved in the run folder: eight weights per byte."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor


def pack_mask(mask: Tensor) -> Tensor:
    """The bits of a mask of any shape."""
    return torch.from_numpy(numpy.packbits(mask.cpu().numpy().ravel()))


def unpack_mask(bits: Tensor, shape: torch.Size) -> Tensor:
    """The mask again."""
    flat = numpy.unpackbits(bits.cpu().numpy(), count=shape.numel())
    return torch.from_numpy(flat.astype(bool)).view(shape)
