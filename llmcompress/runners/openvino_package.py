"""The package `openvino`, imported when a model is run or written: llmcompress works without it."""

from __future__ import annotations

import importlib
from types import ModuleType

from llmcompress.errors import CompressError, ExitCode


def openvino_package(code: str) -> ModuleType:
    """OpenVINO's own Python interface.

    Raises: CompressError of that code where it is not installed.
    """
    try:
        return importlib.import_module("openvino")
    except ImportError as problem:
        raise CompressError(
            code,
            "OpenVINO is used through the package `openvino`, which is not installed",
            fix="pip install llmcompress[openvino]",
            exit_code=ExitCode.REFUSED,
        ) from problem


def openvino_operations() -> ModuleType:
    """The operations of its IR, as functions that make nodes."""
    return importlib.import_module("openvino.opset13")
