"""All algorithms, one file each: `from llmcompress.passes import GPTQ, Wanda` imports them on demand.

The names are those of the classes; `llmcompress passes NAME` explains one with its source and options.
"""

from __future__ import annotations

import importlib
from typing import Any


def _classes() -> dict[str, type]:
    """Name → class of everything that recipes may name."""
    registry = importlib.import_module("llmcompress.passes.base").PASSES
    return {registry[name].__name__: registry[name] for name in registry}


def __getattr__(name: str) -> Any:
    # machinery asks for dunders, and a submodule's name is not a class's: neither may import every pass
    if name.startswith("_") or not name[:1].isupper():
        raise AttributeError(f"module 'llmcompress.passes' has no attribute {name!r}")
    found = _classes()
    if name not in found:
        raise AttributeError(f"there is no pass {name!r}; there are {', '.join(sorted(found))}")
    return found[name]


def __dir__() -> list[str]:
    return sorted(_classes())
