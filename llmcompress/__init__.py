"""Compress causal language models from the Hugging Face Hub, and measure what it costs in quality.

`compress("Qwen/Qwen3-0.6B", "w4", "out")` compresses, evaluates and saves a model. Names are imported on first use, so
`import llmcompress` alone is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from llmcompress.errors import CompressError
    from llmcompress.loading.load import load
    from llmcompress.pipeline import compress, evaluate, inspect, plan
    from llmcompress.recipe import Recipe
    from llmcompress.records.report import Report

__version__ = "0.1.0"

__all__ = [
    "CompressError",
    "Recipe",
    "Report",
    "__version__",
    "compress",
    "evaluate",
    "inspect",
    "load",
    "plan",
]

_HOMES = {
    "CompressError": "llmcompress.errors",
    "Recipe": "llmcompress.recipe",
    "Report": "llmcompress.records.report",
    "compress": "llmcompress.pipeline",
    "evaluate": "llmcompress.pipeline",
    "inspect": "llmcompress.pipeline",
    "load": "llmcompress.loading.load",
    "plan": "llmcompress.pipeline",
}


@wrapt.when_imported("transformers.quantizers.auto")
def _register_plugin(_: object) -> None:
    """Teach `from_pretrained` our manifest as soon as transformers is there, without importing it ourselves."""
    importlib.import_module("llmcompress.loading.plugin")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmcompress' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
