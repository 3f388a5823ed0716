"""One file that is the old one or the new one, whatever happens while it is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmcompress.storage.disk import sync


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to fill; when the block ends it becomes `path`, and the disk has confirmed it.

    It lies in the same folder, because only within one file system is renaming one step. After an error `path` is what
    it was, and the half-written file is gone.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)
