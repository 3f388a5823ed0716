"""Writes tensors one by one into ordinary sharded safetensors, holding one tensor in memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from llmcompress.loading.tensors import write_header
from llmcompress.storage.names import INDEX, SINGLE

_PIECE = 2**24
"""Bytes copied at a time."""

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class ShardWriter:
    """Fills `folder` with `model.safetensors`, or with numbered shards and their index if one file is too small.

    A tensor larger than a shard gets its own shard. Shards get their names in `close`, when their number is known, so
    nothing has to be laid out before the first tensor is written. A safetensors file starts with the offsets of all its
    tensors, so data is collected in a second file, not in memory, until a shard is full.
    """

    def __init__(self, folder: Path, max_shard_size: str) -> None:
        self._folder, self._limit = folder, size_in_bytes(max_shard_size)
        self._pending: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._places: dict[str, tuple[int, int]] = {}
        """Name → where its bytes begin and end among those that wait."""
        self._end = 0
        self._waiting: BinaryIO | None = None
        self._shards: list[list[str]] = []
        self.tensor_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """One more tensor of the checkpoint."""
        assert name not in self._pending and all(name not in shard for shard in self._shards[-1:]), name
        if self._pending and self._end + tensor.nbytes > self._limit:
            self._flush()
        if self._waiting is None:
            self._waiting = (self._folder / "data.part").open("w+b")
        self._waiting.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._pending[name] = (tensor.dtype, tuple(tensor.shape))
        self._places[name] = (self._end, self._end + tensor.nbytes)
        self._end += tensor.nbytes
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
        header, order = write_header(self._pending)
        with self._temporary(len(self._shards)).open("wb") as file:
            file.write(header)
            for begin, end in (self._places[name] for name in order):
                assert self._waiting is not None
                self._waiting.seek(begin)
                for start in range(begin, end, _PIECE):
                    file.write(self._waiting.read(min(_PIECE, end - start)))
        if self._waiting is not None:
            self._waiting.close()
            (self._folder / "data.part").unlink()
        self._shards.append(list(self._pending))
        self._pending, self._places, self._end, self._waiting = {}, {}, 0, None

    def _temporary(self, index: int) -> Path:
        return self._folder / f"shard-{index + 1:05d}.safetensors.part"


class ShardSizes:
    """Takes the place of a `ShardWriter` and writes nothing: only counts the bytes that it would write."""

    def __init__(self, max_shard_size: str) -> None:
        self._limit = size_in_bytes(max_shard_size)
        self._pending: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._waiting = 0
        self.tensor_bytes = 0
        self.file_bytes = 0
        """Of the weight files, headers included."""

    def add(self, name: str, tensor: Tensor) -> None:
        """One more tensor of the checkpoint."""
        if self._pending and self._waiting + tensor.nbytes > self._limit:
            self.close()
        self._pending[name] = (tensor.dtype, tuple(tensor.shape))
        self._waiting += tensor.nbytes
        self.tensor_bytes += tensor.nbytes

    def close(self) -> tuple[str, ...]:
        """Count what waits; there are no files."""
        if self._pending:
            self.file_bytes += len(write_header(self._pending)[0]) + self._waiting
        self._pending, self._waiting = {}, 0
        return ()


def size_in_bytes(text: str) -> int:
    """`5GB` → 5 000 000 000, as the Hub counts.

    Raises: ValueError for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", text)
    if not found:
        raise ValueError(f"{text!r} is not a size; write a number and KB, MB, GB or TB, e.g. 5GB")
    return int(float(found[1]) * _UNITS[found[2]])
