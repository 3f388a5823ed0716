"""A place for measurements that is no folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class KeptMeasurements:
    """All of `ResumeStore` that a table needs."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[Mapping[str, Tensor], Mapping[str, Any]]] = {}

    def measurement(self, name: str) -> tuple[Mapping[str, Tensor], Mapping[str, Any]] | None:
        return self.files.get(name)

    def save_measurement(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        self.files[name] = (tensors, about)
