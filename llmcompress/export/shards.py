"""Writes tensors one after another into ordinary sharded safetensors, holding at most one shard in memory."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from llmcompress.export.disk import share

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class ShardWriter:
    """Fills `folder` with `model.safetensors`, or with numbered shards and their index when one file is too small.

    A tensor larger than a shard gets a shard of its own. Shards get their names in `close`, when their number is
    known: nothing has to be laid out before the first tensor is written.
    """

    def __init__(self, folder: Path, max_shard_size: str) -> None:
        self._folder, self._limit = folder, size_in_bytes(max_shard_size)
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.tensor_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """One more tensor of the checkpoint."""
        assert name not in self._pending and all(name not in shard for shard in self._shards[-1:]), name
        if self._pending and self._pending_bytes + tensor.nbytes > self._limit:
            self._flush()
        self._pending[name] = _alone(tensor.detach().cpu())
        self._pending_bytes += tensor.nbytes
        self.tensor_bytes += tensor.nbytes

    def close(self) -> tuple[str, ...]:
        """Write what is left and give every file its final name; the names of the weight files."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._temporary(0).rename(self._folder / SINGLE)
            return (SINGLE,)
        names = tuple(f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count))
        weight_map: dict[str, str] = {}
        for i, name in enumerate(names):
            self._temporary(i).rename(self._folder / name)
            weight_map |= dict.fromkeys(self._shards[i], name)
        index = {"metadata": {"total_size": self.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        return names

    def _flush(self) -> None:
        path = self._temporary(len(self._shards))
        save_file(self._pending, path, metadata={"format": "pt"})
        share(path)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _temporary(self, index: int) -> Path:
        return self._folder / f"shard-{index + 1:05d}.safetensors.part"


def size_in_bytes(text: str) -> int:
    """`5GB` → 5 000 000 000, as the Hub counts.

    Raises: ValueError for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", text)
    if not found:
        raise ValueError(f"{text!r} is not a size; write a number and KB, MB, GB or TB, e.g. 5GB")
    return int(float(found[1]) * _UNITS[found[2]])


def _alone(tensor: Tensor) -> Tensor:
    """The same values in memory of their own: safetensors writes no views."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone().contiguous()
