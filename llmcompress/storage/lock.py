"""One process per run folder, and no lock that outlives its process."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import psutil

from llmcompress.errors import CompressError, ExitCode

_CLOCK_STEP_SECONDS = 60
"""A process's start time moves with the system clock; two processes with one id do not start this close together."""


class ProcessLock:
    """`process.json` in a folder: id and start time of the process that works there.

    A process is known by both, so an id that is used again after a crash or a reboot locks nobody out.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "process.json"
        self._held = False

    def is_held(self) -> bool:
        """Whether a living process, this one included, holds it."""
        try:
            return _living_owner(self._path.read_text(), time.time() - self._path.stat().st_mtime) is not None
        except (FileNotFoundError, NotADirectoryError):
            return False

    def take(self) -> None:
        """Take the lock; one left by a process that is gone is removed.

        Raises: CompressError when a living process holds it.
        """
        mine = json.dumps({"pid": os.getpid(), "started": psutil.Process().create_time()})
        for _ in range(3):
            try:
                handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                self._remove_if_stale()
            else:
                with os.fdopen(handle, "w") as file:
                    file.write(mine)
                self._held = True
                return
        raise self._busy("another process")

    def release(self) -> None:
        """Give it back; does nothing when it is not held."""
        if self._held:
            self._path.unlink(missing_ok=True)
            self._held = False

    def _remove_if_stale(self) -> None:
        try:
            text, age = self._path.read_text(), time.time() - self._path.stat().st_mtime
        except FileNotFoundError:
            return
        if owner := _living_owner(text, age):
            raise self._busy(owner)
        taken = self._path.with_suffix(f".stale-{os.getpid()}")
        try:
            os.rename(self._path, taken)
        except FileNotFoundError:
            return
        if taken.read_text() != text:
            # someone else was faster, and this is their new lock
            os.rename(taken, self._path)
            raise self._busy("another process")
        taken.unlink()

    def _busy(self, who: str) -> CompressError:
        return CompressError(
            "run.locked",
            f"{who} works on this run",
            where=str(self._path.parent),
            fix="wait for it, or choose another output folder",
            saved="everything; nothing was changed",
            exit_code=ExitCode.USAGE,
        )


def _living_owner(text: str, age_seconds: float) -> str | None:
    """Who holds a lock with this content, in words; None when that process is gone."""
    if not text and age_seconds < 5:
        return "a process that is just starting"
    try:
        owner = json.loads(text)
        pid, started = int(owner["pid"]), float(owner["started"])
        if abs(psutil.Process(pid).create_time() - started) > _CLOCK_STEP_SECONDS:
            return None
    except (ValueError, KeyError, TypeError, psutil.Error):
        return None
    return f"process {pid}, started {(time.time() - started) / 60:.0f} minutes ago,"
