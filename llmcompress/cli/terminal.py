"""Progress on stderr: a live two-level display on a terminal, elsewhere a plain line every half minute."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TextIO

import psutil
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 30.0
STEPS_FOR_ESTIMATE = 8
"""The time left comes from the latest steps: blocks restored from an interrupted run take no time."""


class TerminalProgress:
    """A `Progress` for people. Use it as a context manager."""

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        stream = sys.stderr if stream is None else stream
        self._console = Console(file=stream, highlight=False, soft_wrap=not stream.isatty())
        self._live = (
            Live(self, console=self._console, refresh_per_second=4, transient=True) if stream.isatty() else None
        )
        self._clock = clock
        self._memory = _Memory()
        self._title, self._steps, self._done = "", 0, 0
        self._text, self._inside = "", ""
        self._began = self._step_began = self._last_line = clock()
        self._latest: deque[float] = deque(maxlen=STEPS_FOR_ESTIMATE)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish_stage()
        self._title = ""
        if self._live:
            self._live.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the terminal to a question."""
        if self._live:
            self._live.stop()
        yield
        if self._live:
            self._live.start()

    def stage(self, title: str, steps: int) -> None:
        """Begin a stage of `steps` equal steps; 0 when nobody knows how many."""
        self._finish_stage()
        self._title, self._steps, self._done = title, steps, 0
        self._text, self._inside = "", ""
        self._began = self._step_began = self._last_line = self._clock()
        self._latest.clear()
        if not self._live:
            self._line(f"{title} ({steps} steps)" if steps else title)

    def step(self, text: str) -> None:
        """One more step is done."""
        now = self._clock()
        self._latest.append(now - self._step_began)
        self._step_began = now
        self._done += 1
        self._text, self._inside = text, ""
        self._line_if_due()

    def inside(self, text: str) -> None:
        """What the running step does now."""
        self._inside = text
        self._line_if_due()

    def note(self, text: str) -> None:
        """A line that stays visible."""
        self._line(f"note: {text}")

    @property
    def seconds_left(self) -> float | None:
        """From the latest steps; None before the first."""
        if not self._latest or self._done >= self._steps:
            return None
        mean = sum(self._latest) / len(self._latest)
        return max(0.0, mean * (self._steps - self._done) - (self._clock() - self._step_began))

    def __rich__(self) -> Table:
        """The live display."""
        grid = Table.grid(padding=(0, 2))
        if not self._title:
            return grid
        bar = ProgressBar(total=self._steps or None, completed=self._done, width=24, pulse=not self._steps)
        grid.add_row(Text(self._title, style="bold"), bar, self._summary())
        if self._inside:
            grid.add_row("", "", Text(f"› {self._inside}", style="dim"))
        return grid

    def _summary(self) -> str:
        """`block 3/12, 0:42 left, memory 1.2 GB, peak 1.9 GB`."""
        left = self.seconds_left
        elapsed = f"{duration(self._clock() - self._began)} elapsed"
        time_text = f"{duration(left)} left" if left is not None else elapsed
        return ", ".join(part for part in (self._text, time_text, self._memory.text()) if part)

    def _finish_stage(self) -> None:
        seconds = self._clock() - self._began
        if self._title and self._done:
            self._line(f"{self._title}: {self._done} steps in {duration(seconds)}, {self._memory.text()}")

    def _line_if_due(self) -> None:
        if not self._live and self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
            inside = f" › {self._inside}" if self._inside else ""
            self._line(f"{self._title}{inside}: {self._summary()}")

    def _line(self, text: str) -> None:
        self._last_line = self._clock()
        self._console.print(Text(text))


class _Memory:
    """Resident memory of this process, now and at its highest."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._peak = 0

    def text(self) -> str:
        now = self._process.memory_info().rss
        self._peak = max(self._peak, now, _highest_so_far())
        return f"memory {size(now)}, peak {size(self._peak)}"


def _highest_so_far() -> int:
    """What the system remembers as the peak; 0 where it does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:07:20`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """`4.9 MB`: decimal units, as disks and the Hub count."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
