"""The `gguf` package, imported when a file is written or read: llmcompress works without it."""

from __future__ import annotations

from types import ModuleType

from llmcompress.errors import CompressError, ExitCode


def gguf_package() -> ModuleType:
    """The package that the authors of the format maintain.

    Raises: CompressError where it is not installed.
    """
    try:
        import gguf
    except ImportError as problem:
        raise CompressError(
            "export.package",
            "GGUF files are written by the package `gguf`, which is not installed",
            fix="pip install llmcompress[gguf]",
            exit_code=ExitCode.REFUSED,
        ) from problem
    package: ModuleType = gguf
    return package
