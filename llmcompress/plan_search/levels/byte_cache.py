"""A cache bounded by bytes: what was used least recently goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class ByteCache(Generic[V]):
    """Values by key, of known sizes. One that is larger than the limit is not kept."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._values: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()

    def get(self, key: Hashable) -> V | None:
        """The value, which counts as used."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Hashable, value: V, bytes_held: int) -> V:
        """Keep a value, and drop others for it."""
        if key in self._values:
            self.bytes -= self._values.pop(key)[1]
        if bytes_held <= self.limit_bytes:
            self._values[key] = (value, bytes_held)
            self.bytes += bytes_held
        while self.bytes > self.limit_bytes:
            self.bytes -= self._values.popitem(last=False)[1][1]
        return value
