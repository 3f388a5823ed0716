"""Optuna, which keeps the trials of a study: an optional dependency."""

from __future__ import annotations

import logging
from types import ModuleType

from llmcompress.errors import CompressError


def optuna_library() -> ModuleType:
    """Optuna, silent.

    Raises: CompressError when it is not installed.
    """
    try:
        import optuna
    except ImportError as missing:
        raise CompressError(
            "search.package",
            f"a search needs {missing.name}, which is not installed",
            fix='pip install "llmcompress[search]"',
        ) from None
    optuna.logging.get_logger("optuna").setLevel(logging.WARNING)
    return optuna
