"""Search: which compression for which part of a model, on exact bytes and measured speed; the result is a recipe.

`llmcompress.search(model, "joint", "study")` runs one: this package can be called, because a function of its name is
what users look for (docs/decisions/0055).
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmcompress.records.search import SearchReport


class _CallablePackage(ModuleType):
    def __call__(self, model: str | Path | None, space: Any, output: str | Path, **options: Any) -> SearchReport:
        """See `llmcompress.search.searching.search`."""
        from llmcompress.search.searching import search

        return search(model, space, output, **options)


sys.modules[__name__].__class__ = _CallablePackage
