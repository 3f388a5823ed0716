"""Tensors in one safetensors file with a digest of every byte: read back as they were, or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmcompress.storage.atomic import replacing

_DIGEST = "digest"


def save_checked(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace the file atomically; other processes may be writing it, too.

    Raises: OSError, SafetensorError.
    """
    with replacing(path, shared=True) as part:
        save_file(dict(tensors), part, metadata={_DIGEST: _digest(tensors)})


def load_checked(path: Path) -> dict[str, Tensor] | None:
    """What was saved, mapped from the file: it takes memory only where it is read. None: missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            intact = (file.metadata() or {}).get(_DIGEST) == _digest(tensors)
    except (OSError, SafetensorError):
        return None
    return tensors if intact else None


def own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors wants them: contiguous, and no two in one memory."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = (tensor.clone() if place in seen and tensor.numel() else tensor).contiguous()
        seen.add(place)
    return found


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and every byte."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
