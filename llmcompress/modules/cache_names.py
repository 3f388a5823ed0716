"""The names of the KV cache in a module's arguments and a model's outputs.

transformers 5.24 renamed `past_key_values` to `cache`; blocks of some families use other names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""The newest first."""


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """The name under which a forward takes its cache; None when it takes none by any known name."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def with_cache(forward: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """Keyword arguments that hand a forward this cache; empty when it takes none."""
    name = cache_argument(forward)
    return {} if name is None else {name: cache}


def cache_of(output: Any) -> Any:
    """The cache that a model's output carries; None when it has none."""
    return next((found for name in CACHE_NAMES if (found := getattr(output, name, None)) is not None), None)
