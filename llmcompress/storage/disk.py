"""Crash-safe files: synced, hashed, with clear errors for a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from llmcompress.errors import CompressError, ExitCode


@contextmanager
def disk_errors(where: Path, *, saved: str) -> Iterator[None]:
    """A full or failing disk, told as the user's problem that it is.

    Raises: CompressError (exit code 4) for every OSError.
    """
    try:
        yield
    except (OSError, SafetensorError) as problem:
        # safetensors passes the system's message on, but not its number
        full = any(os.strerror(code) in str(problem) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
        raise CompressError(
            "output.disk-full" if full else "output.write-failed",
            f"could not write: {problem}",
            where=str(where),
            fix="free disk space and run the same command again",
            saved=saved,
            exit_code=ExitCode.RESOURCES,
        ) from problem


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have the disk confirm a file, or a folder's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
