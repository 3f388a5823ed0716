"""Measures the duration of the stages of a run."""

from __future__ import annotations

import time

from llmcompress.records.measurements import StageSeconds


class Stopwatch:
    """Wall seconds by stage."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Everything since the last lap was `name`."""
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def stages(self) -> list[StageSeconds]:
        """All laps."""
        return [StageSeconds(stage=name, seconds=seconds) for name, seconds in self._seconds.items()]
