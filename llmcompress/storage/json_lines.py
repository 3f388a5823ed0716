"""Files of JSON lines that survive a crash: a line is there as a whole, or it is cut when the file is read again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llmcompress.storage.disk import sync


def append_line(path: Path, text: str, *, durable: bool = True) -> None:
    """One line more, without its end; `durable`: the disk has it when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")
        if durable:
            file.flush()
            os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[Any]:
    """All values, none where there is no file; what a crash tore off is cut from the file, with all that follows."""
    data = path.read_bytes() if path.exists() else b""
    found, good = [], 0
    for raw in data.splitlines(keepends=True):
        try:
            value = json.loads(raw) if raw.endswith(b"\n") else None
        except ValueError:
            value = None
        if value is None:
            break
        found.append(value)
        good += len(raw)
    if good < len(data):
        with path.open("r+b") as file:
            file.truncate(good)
        sync(path)
    return found
