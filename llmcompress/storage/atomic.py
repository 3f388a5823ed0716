"""Replaces a file atomically: it is the old one or the new one, whatever happens during writing."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmcompress.storage.disk import sync


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A file next to `path` to fill; when the block ends it becomes `path`, synced to disk.

    It is in the same folder, because renaming is atomic only within one file system. After an error `path` is what
    it was, and the half-written file is gone. `shared`: other processes may write the same file at this moment.
    """
    own = f".{uuid.uuid4().hex[:8]}" if shared else ""
    part = path.with_name(f"{path.name}{own}.part")
    try:
        yield part
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)
