"""The `onnx` package, imported when a file is written or read: llmcompress works without it."""

from __future__ import annotations

import importlib
from types import ModuleType

from llmcompress.errors import CompressError, ExitCode


def onnx_package() -> ModuleType:
    """The package that the authors of the format maintain, with its helpers.

    Raises: CompressError where it is not installed.
    """
    try:
        package = importlib.import_module("onnx")
        for part in ("helper", "external_data_helper", "numpy_helper", "shape_inference", "defs"):
            importlib.import_module(f"onnx.{part}")
    except ImportError as problem:
        raise CompressError(
            "export.package",
            "ONNX files are written by the package `onnx`, which is not installed",
            fix='pip install "llmcompress[onnx]"',
            exit_code=ExitCode.REFUSED,
        ) from problem
    return package
