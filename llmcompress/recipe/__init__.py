"""The recipe: strict YAML ⇄ frozen data. Names are imported when first used: to name a mistake takes no PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmcompress.calibration.settings import Calibration
    from llmcompress.evaluation.settings.perplexity import PerplexityTask
    from llmcompress.recipe.model import Recipe, Save
    from llmcompress.recipe.order import check_order, check_sites
    from llmcompress.recipe.reading import json_schema, parse_recipe, read_recipe

__all__ = [
    "Calibration",
    "PerplexityTask",
    "Recipe",
    "Save",
    "check_order",
    "check_sites",
    "json_schema",
    "parse_recipe",
    "read_recipe",
]

_HOMES = {
    "Calibration": "llmcompress.calibration.settings",
    "PerplexityTask": "llmcompress.evaluation.settings.perplexity",
    "Recipe": "llmcompress.recipe.model",
    "Save": "llmcompress.recipe.model",
    "check_order": "llmcompress.recipe.order",
    "check_sites": "llmcompress.recipe.order",
    "json_schema": "llmcompress.recipe.reading",
    "parse_recipe": "llmcompress.recipe.reading",
    "read_recipe": "llmcompress.recipe.reading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmcompress.recipe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
