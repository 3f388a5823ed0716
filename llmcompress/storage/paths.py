"""Paths as users write them, and the folder of the cache."""

from __future__ import annotations

import os
from pathlib import Path


def from_home(written: str) -> Path:
    """`~/x` and `~user/x` as the folders that they mean; as written where there is no such user, so that it is missing.

    (`Path.expanduser` raises a RuntimeError there.)
    """
    return Path(os.path.expanduser(written))


def is_there(path: Path) -> bool:
    """Whether a file or folder of that name is on disk; a name that no file system takes is not.

    (`Path.exists` raises an OSError for one that is too long.)
    """
    return os.path.exists(path)


def cache_folder() -> Path:
    """`LLMCOMPRESS_CACHE`, or `llmcompress` in `XDG_CACHE_HOME`, or in `~/.cache`."""
    named = os.environ.get("LLMCOMPRESS_CACHE")
    if named:
        return from_home(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmcompress"
