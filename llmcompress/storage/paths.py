"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def from_home(written: str) -> Path:
    """`~/x` and `~user/x` as the folders that they mean; as written where there is no such user, so that it is missing.

    (`Path.expanduser` raises a RuntimeError there.)
    """
    return Path(os.path.expanduser(written))
