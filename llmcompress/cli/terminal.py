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
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from llmcompress.errors import without_tokens

SECONDS_BETWEEN_LINES = 30.0
STEPS_FOR_ESTIMATE = 8
"""The time left comes from the latest steps: blocks restored from an interrupted run take no time."""


class TerminalProgress:
    """A `Progress` for people. Use it as a context manager."""

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        stream = sys.stderr if stream is None else stream
        self._live, self._clock = stream.isatty(), clock
        self._console = Console(file=stream, highlight=False, soft_wrap=not self._live)
        self._bars = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            _Status(self),
            console=self._console,
            refresh_per_second=4,
            transient=True,
            get_time=clock,
            disable=not self._live,
        )
        self._memory = _Memory()
        self._stage: TaskID | None = None
        self._text = ""
        self._steps, self._parts = _Pace(clock, 0), _Pace(clock, 0)
        self._inside = ""
        self._last_line = clock()

    def __enter__(self) -> Self:
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_stage(finished=kind is None)
        if self._live:
            self._bars.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the terminal to a question."""
        if self._live:
            self._bars.stop()
        yield
        if self._live:
            self._bars.start()

    def stage(self, title: str, steps: int) -> None:
        """Begin a stage of `steps` equal steps; 0 when nobody knows how many."""
        self._end_stage(finished=True)
        self._stage = self._bars.add_task(title, total=steps or None)
        self._steps, self._text, self._inside = _Pace(self._clock, steps), "", ""
        self._last_line = self._clock()
        if not self._live:
            self._line(f"{title} ({steps} steps)" if steps else title)

    def step(self, text: str) -> None:
        """One more step is done."""
        self._steps.reach(self._steps.done + 1)
        if self._stage is not None:
            self._bars.advance(self._stage)
        self._text, self._inside = text, ""
        self._line_if_due()

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        """What the running step does now, and how many of its parts are done."""
        if not self._inside or total != self._parts.total or done < self._parts.done:
            self._parts = _Pace(self._clock, total, done)
        else:
            self._parts.reach(done)
        self._inside = text
        self._line_if_due()

    def note(self, text: str) -> None:
        """A line that stays visible."""
        self._line(f"note: {text}")

    @property
    def seconds_left(self) -> float | None:
        """Of the stage; None before its first step."""
        return self._steps.seconds_left

    def summary(self) -> str:
        """`block 3/12, 0:42 left, memory 1.2 GB, peak 1.9 GB`."""
        left = self._steps.seconds_left
        time_text = f"{duration(self._steps.elapsed)} elapsed" if left is None else f"{duration(left)} left"
        return ", ".join(part for part in (self._text, time_text, self._memory.text()) if part)

    def substep_text(self) -> str:
        """`recover: loss 2.31, 40/200, 0:12 left`; empty between steps."""
        parts, left = self._parts, self._parts.seconds_left
        count = f"{parts.done}/{parts.total}" if self._inside and parts.total else ""
        time_text = f"{duration(left)} left" if self._inside and left is not None else ""
        return ", ".join(part for part in (self._inside, count, time_text) if part)

    def _end_stage(self, *, finished: bool) -> None:
        if self._stage is None:
            return
        task, seconds = self._bars.tasks[0], self._steps.elapsed
        if finished and self._steps.done:
            self._line(f"{task.description}: {self._steps.done} steps in {duration(seconds)}, {self._memory.text()}")
        self._bars.remove_task(self._stage)
        self._stage = None

    def _line_if_due(self) -> None:
        if self._stage is not None and not self._live and self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
            inside = f" › {self.substep_text()}" if self._inside else ""
            self._line(f"{self._bars.tasks[0].description}{inside}: {self.summary()}")

    def _line(self, text: str) -> None:
        self._last_line = self._clock()
        self._console.print(Text(without_tokens(text)))


class _Status(ProgressColumn):
    """What has just been done, the time left, memory; below it what the running step does."""

    def __init__(self, progress: TerminalProgress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        """Both lines."""
        inside = self._progress.substep_text()
        return Text.assemble(self._progress.summary(), (f"\n› {inside}" if inside else "", "dim"))


class _Pace:
    """How far something has come, and how long the rest takes if it goes on like the latest steps.

    rich estimates from all steps within a period, so blocks restored from an interrupted run would promise too much.
    """

    def __init__(self, clock: Callable[[], float], total: int, done: int = 0) -> None:
        self._clock, self.total, self.done = clock, total, done
        self._began = self._latest = clock()
        self._seconds: deque[float] = deque(maxlen=STEPS_FOR_ESTIMATE)

    def reach(self, done: int) -> None:
        """So many are done now."""
        if done > self.done:
            now = self._clock()
            self._seconds.append((now - self._latest) / (done - self.done))
            self._latest, self.done = now, done

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began

    @property
    def seconds_left(self) -> float | None:
        """None before the first step, and at the end."""
        if not self._seconds or self.done >= self.total:
            return None
        mean = sum(self._seconds) / len(self._seconds)
        return max(0.0, mean * (self.total - self.done) - (self._clock() - self._latest))


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
