"""Compress causal language models from the Hugging Face Hub, and measure what it costs in quality.

`compress("Qwen/Qwen3-0.6B", "w4", "out")` is the whole thing; docs/python.md has the rest. Names are imported when
first used, so that `import llmcompress` alone is instant.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from llmcompress.calibration.settings import Calibration
    from llmcompress.compressed_model import CompressedModel, footprint
    from llmcompress.errors import CompressError
    from llmcompress.evaluation.settings.perplexity import PerplexityTask
    from llmcompress.fixed_recipe import allocate
    from llmcompress.loading.load import load
    from llmcompress.model_evaluation import compare, evaluate
    from llmcompress.model_export import export
    from llmcompress.pipeline import compress, inspect, plan, speed
    from llmcompress.plan_search.searching import search
    from llmcompress.progress import ProgressEvent
    from llmcompress.recipe import Recipe
    from llmcompress.records.evaluation import Evaluation
    from llmcompress.records.report import Report
    from llmcompress.report.folder import write_report
    from llmcompress.report.tracking import track
    from llmcompress.verification.verifying import verify

__version__ = "0.2.0"

_HOMES = {
    "Calibration": "llmcompress.calibration.settings",
    "CompressError": "llmcompress.errors",
    "CompressedModel": "llmcompress.compressed_model",
    "Evaluation": "llmcompress.records.evaluation",
    "PerplexityTask": "llmcompress.evaluation.settings.perplexity",
    "ProgressEvent": "llmcompress.progress",
    "Recipe": "llmcompress.recipe",
    "Report": "llmcompress.records.report",
    "allocate": "llmcompress.fixed_recipe",
    "compare": "llmcompress.model_evaluation",
    "compress": "llmcompress.pipeline",
    "evaluate": "llmcompress.model_evaluation",
    "export": "llmcompress.model_export",
    "footprint": "llmcompress.compressed_model",
    "inspect": "llmcompress.pipeline",
    "load": "llmcompress.loading.load",
    "plan": "llmcompress.pipeline",
    "search": "llmcompress.plan_search.searching",
    "speed": "llmcompress.pipeline",
    "track": "llmcompress.report.tracking",
    "verify": "llmcompress.verification.verifying",
    "write_report": "llmcompress.report.folder",
}

__all__ = [
    "Calibration",
    "CompressError",
    "CompressedModel",
    "Evaluation",
    "PerplexityTask",
    "ProgressEvent",
    "Recipe",
    "Report",
    "__version__",
    "allocate",
    "compare",
    "compress",
    "evaluate",
    "export",
    "footprint",
    "inspect",
    "load",
    "plan",
    "search",
    "speed",
    "track",
    "verify",
    "write_report",
]

# a library is silent until the program that uses it sets logging up
logging.getLogger("llmcompress").addHandler(logging.NullHandler())


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
