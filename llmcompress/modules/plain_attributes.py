"""Attributes of a module that are plain data and describe what the module is."""

from __future__ import annotations

from typing import Any

from torch import nn

_PASSING = frozenset({"training", "gradient_checkpointing"})
"""Attributes that say how a module is used at the moment, not what it is."""


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Numbers, words and tuples of both."""
    return _of_kind(module, int | float | str)


def plain_numbers(module: nn.Module) -> dict[str, Any]:
    """Numbers, and tuples of them that are not empty."""
    return {key: value for key, value in _of_kind(module, int | float).items() if value != ()}


def _of_kind(module: nn.Module, kind: Any) -> dict[str, Any]:
    found = {}
    for key, value in vars(module).items():
        parts = value if isinstance(value, tuple) else (value,)
        if not key.startswith("_") and key not in _PASSING and all(isinstance(part, kind) for part in parts):
            found[key] = value
    return found
