"""One process per run folder: an operating-system lock, released when its process ends in any way."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llmcompress.errors import CompressError, ExitCode


class ProcessLock:
    """`lock` in a folder, and next to it `process.json`, which names its owner.

    The second file is informative only: one left behind by a killed process does not lock anything.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._owner = folder, folder / "process.json"
        self._lock = FileLock(folder / "lock", thread_local=False)

    def is_held(self) -> bool:
        """Whether a living process, this one included, holds it."""
        if self._lock.is_locked:
            return True
        if not (self._folder / "lock").is_file():
            return False
        try:
            with self._lock.acquire(timeout=0):
                return False
        except OSError:  # it is held, or belongs to another user
            return True

    def take(self) -> None:
        """Take the lock, or say at once who has it.

        Raises: CompressError when a living process holds it.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise CompressError(
                "run.locked",
                f"{_described(self._owner)} is working on this run",
                where=str(self._folder),
                fix="wait for it, or choose another output folder",
                saved="everything; nothing was changed",
                exit_code=ExitCode.USAGE,
            ) from None
        about = {"pid": os.getpid(), "host": socket.gethostname(), "began": time.time()}
        self._owner.write_text(json.dumps(about) + "\n")

    def release(self) -> None:
        """Give it back; does nothing when it is not held."""
        if self._lock.is_locked:
            self._owner.unlink(missing_ok=True)
            self._lock.release()


def _described(owner: Path) -> str:
    """Who holds the lock, in words; its file may be missing or torn while that process is just starting."""
    try:
        about: dict[str, Any] = json.loads(owner.read_text())
        minutes = (time.time() - float(about["began"])) / 60
        return f"process {int(about['pid'])} on {about['host']}, for {minutes:.0f} minutes,"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
