"""Worker processes of one host: started, one GPU each, and started again when one dies."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from llmcompress.errors import CompressError, ExitCode

RESTARTS = 3
"""Of one worker, which may die of a plan that crashes its process; then something else is wrong."""

END_SECONDS = 10
"""A worker has so long to end when it is told to."""


class WorkerProcesses:
    """So many processes that each run a command, until the block is left; each writes a log."""

    def __init__(self, command: Callable[[int], Sequence[str]], count: int, logs: Path) -> None:
        self._command, self._count, self._logs = command, count, logs
        self._running: list[subprocess.Popen[bytes]] = []
        self._restarts = [0] * count

    def __enter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        self._running = [self._start(index) for index in range(self._count)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running:
            process.terminate()
        for process in self._running:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def tend(self) -> None:
        """Start those again that died.

        Raises: CompressError when one dies again and again.
        """
        for index, process in enumerate(self._running):
            if process.poll() in (None, 0):
                continue
            self._restarts[index] += 1
            if self._restarts[index] > RESTARTS:
                raise CompressError(
                    "search.workers",
                    f"a worker process ended {1 + RESTARTS} times: {_last_line(self.log(index))}",
                    where=str(self.log(index)),
                    fix="see its log; the same command goes on from what was found",
                    saved="all outcomes",
                    exit_code=ExitCode.RESOURCES,
                )
            self._running[index] = self._start(index)

    def log(self, index: int) -> Path:
        """What that worker printed."""
        return self._logs / f"worker-{index}.log"

    def _start(self, index: int) -> subprocess.Popen[bytes]:
        with self.log(index).open("ab") as log:
            return subprocess.Popen(
                list(self._command(index)), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1][:200] if lines else "it printed nothing"
