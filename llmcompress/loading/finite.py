"""Refuses configs with NaN or Inf, which would make every output NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmcompress.errors import CompressError
from llmcompress.loading.files import shortened_list

_MAY_BE_INFINITE = ("limit", "max", "min", "clip")
"""Words in the names of bounds, which infinity leaves open (Mamba's `time_step_limit`)."""


def refuse_not_finite_numbers(config: dict[str, Any], folder: Path) -> None:
    """Raises: CompressError naming every key of a configuration whose number is not finite."""
    wrong = [f"{key} = {value}" for key, value in _numbers(config, "") if not _is_usable(key, value)]
    if wrong:
        raise CompressError(
            "model.bad-config",
            "config.json contains NaN or Inf",
            where=f"{folder / 'config.json'}: {shortened_list(wrong)}",
            fix="compare it with the config.json of the original model",
        )


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, key)


def _is_usable(key: str, value: float) -> bool:
    return math.isfinite(value) or (math.isinf(value) and any(word in key for word in _MAY_BE_INFINITE))
