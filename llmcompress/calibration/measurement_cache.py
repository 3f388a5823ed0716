"""A cache of measurements, valid while the model does not change; no statistic is measured twice. N = windows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor

from llmcompress.calibration.settings import Experts
from llmcompress.numerics.statistics import Statistic

MOST_BYTES = 256 << 20
"""Held in memory; Gram matrices of large models are measured again."""

Name = tuple[str, ...]
Kept = TypeVar("Kept", Tensor, Statistic)


class MeasurementCache:
    """The measurements of one run, each for one state of the model and one set of windows."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0
        self._known: dict[Name, Tensor | Statistic] = {}
        self._counted: set[int] = set()

    def of(self, state: str | None, windows_NT: Tensor, experts: Experts) -> CachedMeasurements | None:
        """Measurements of that state of the model on these windows; None if the state is unknown."""
        if state is None:
            return None
        windows = hashlib.sha256(windows_NT.contiguous().cpu().numpy().tobytes()).hexdigest()
        return CachedMeasurements(self, (state, windows, experts))

    def _find(self, name: Name) -> Tensor | Statistic | None:
        return self._known.get(name)

    def _put(self, name: Name, found: Tensor | Statistic) -> None:
        shared = id(found) in self._counted  # sites that share an input share its statistic
        size = 0 if shared else sum(tensor.numel() * tensor.element_size() for tensor in _tensors(found))
        if name not in self._known and self.held_bytes + size <= self.most_bytes:
            self.held_bytes += size
            self._known[name] = found
            self._counted.add(id(found))


class CachedMeasurements:
    """The measurements of one state of the model on one set of windows."""

    def __init__(self, store: MeasurementCache, key: Name) -> None:
        self._store, self._key = store, key

    def find(self, kind: type[Kept], *name: str) -> Kept | None:
        """The measurement of that name; it must not be changed."""
        found = self._store._find((*self._key, kind.__qualname__, *name))
        assert found is None or isinstance(found, kind)
        return found

    def put(self, found: Tensor | Statistic, *name: str) -> None:
        """Keep it, if there is room."""
        self._store._put((*self._key, type(found).__qualname__, *name), found)


def _tensors(found: Tensor | Statistic) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    else:
        yield from (value for value in vars(found).values() if isinstance(value, Tensor))
