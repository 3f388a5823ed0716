"""A cache of tensors for later runs: bounded in size, shared by processes, verified when read."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from llmcompress.storage.checked_tensors import load_checked, save_checked

LIMIT_BYTES = 2**32
"""Of all files of a cache together; the ones that were not used for longest go first."""

_ABANDONED_SECONDS = 3600
"""A file that is still being written after so long belongs to a process that was killed."""


class TensorCache:
    """Named tensors by key, one safetensors file each.

    A file appears complete or not at all, so processes may share a folder without a lock: the last one to write a key
    writes the same values. Missing or damaged entries, and those that cannot be written, are computed again, never an
    error.
    """

    def __init__(self, folder: Path, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes

    def get(self, key: str) -> dict[str, Tensor] | None:
        """What was put there, mapped from its file: it takes memory only where it is read. None: nothing of use."""
        path = self._path(key)
        tensors = load_checked(path)
        with suppress(OSError):
            if tensors is None:
                path.unlink(missing_ok=True)
            else:
                os.utime(path)  # the files used last stay longest
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """Keep them; whether that worked. Too much for the cache's limit is not kept."""
        if sum(tensor.nbytes for tensor in tensors.values()) > self._limit_bytes:
            return False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_checked(self._path(key), tensors)
            self._shrink()
        except (OSError, SafetensorError):
            return False
        return True

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def _shrink(self) -> None:
        """Remove the files used longest ago until the rest is within the limit, and what killed processes left."""
        total = 0
        for path in sorted(self._folder.glob("*.safetensors"), key=_last_used, reverse=True):
            total += _bytes(path)
            if total > self._limit_bytes:
                path.unlink(missing_ok=True)
        for part in self._folder.glob("*.part"):
            if time.time() - _last_used(part) > _ABANDONED_SECONDS:
                part.unlink(missing_ok=True)


def _last_used(path: Path) -> float:
    """0 when another process removed it meanwhile."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
