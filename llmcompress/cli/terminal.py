"""Progress on stderr: a live two-level display on a terminal, otherwise a plain line every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TextIO

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

from llmcompress.errors import without_tokens
from llmcompress.progress import Pace
from llmcompress.report.forms import duration, size

SECONDS_BETWEEN_LINES = 30.0

UNLIMITED = 10_000


class TerminalProgress:
    """A `Progress` for people. Use it as a context manager."""

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        stream = sys.stderr if stream is None else stream
        self._live, self._clock = stream.isatty(), clock
        self._console = Console(file=stream, highlight=False, soft_wrap=not self._live)
        title = Column(no_wrap=True, max_width=_title_width(self._console.width), overflow="ellipsis")
        self._bars = Progress(
            TextColumn("{task.description}", style="bold", markup=False, table_column=title),
            _Bar(self._console),
            _Status(self, self._console),
            console=self._console,
            refresh_per_second=4,
            transient=True,
            get_time=clock,
            disable=not self._live,
        )
        self._memory = _Memory()
        self._stage: TaskID | None = None
        self._text = ""
        self._steps, self._parts = Pace(clock, 0), Pace(clock, 0)
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
        """Begin a stage of `steps` equal steps; 0 if their number is unknown."""
        self._end_stage(finished=True)
        self._stage = self._bars.add_task(title, total=steps or None)
        self._steps, self._text, self._inside = Pace(self._clock, steps), "", ""
        self._last_line = self._clock()
        if not self._live:
            self._line(f"{title} ({counted(steps)})" if steps else title)

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
            self._parts = Pace(self._clock, total, done)
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

    def summary(self, width: int = UNLIMITED) -> str:
        """`block 3/12, 0:42 left, memory 1.2 GB, peak 1.9 GB`; in less width the time left and what has room beside."""
        left = self._steps.seconds_left
        time_text = f"{duration(self._steps.elapsed)} elapsed" if left is None else f"{duration(left)} left"
        memory, peak = self._memory.texts()
        for beside in ((memory, peak), (memory,)):
            line = ", ".join(part for part in (self._text, time_text, *beside) if part)
            if len(line) <= width:
                return line
        return _shortened(self._text, time_text, width)

    def substep_text(self, width: int = UNLIMITED) -> str:
        """`recover: loss 2.31, 40/200, 0:12 left`; empty between steps. In less width what comes first is shortened."""
        parts, left = self._parts, self._parts.seconds_left
        count = f"{parts.done}/{parts.total}" if self._inside and parts.total else ""
        time_text = f"{duration(left)} left" if self._inside and left is not None else ""
        return _shortened(self._inside, ", ".join(part for part in (count, time_text) if part), width)

    def _end_stage(self, *, finished: bool) -> None:
        if self._stage is None:
            return
        task, seconds = self._bars.tasks[0], self._steps.elapsed
        if finished and self._steps.done:
            memory = ", ".join(self._memory.texts())
            self._line(f"{task.description}: {counted(self._steps.done)} in {duration(seconds)}, {memory}")
        self._bars.remove_task(self._stage)
        self._stage = None

    def _line_if_due(self) -> None:
        if self._stage is not None and not self._live and self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
            inside = f" › {self.substep_text()}" if self._inside else ""
            self._line(f"{self._bars.tasks[0].description}{inside}: {self.summary()}")

    def _line(self, text: str) -> None:
        self._last_line = self._clock()
        self._console.print(Text(without_tokens(text)))


class _Bar(BarColumn):
    """Wider on a wide terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> ProgressBar:
        """As rich draws it."""
        self.bar_width = _bar_width(self._console.width)
        return super().render(task)


def _title_width(width: int) -> int:
    """Of a stage; a longer title is cut."""
    return width * 2 // 5 if width >= 60 else width // 4


def _bar_width(width: int) -> int:
    return 24 if width >= 100 else 12 if width >= 70 else 4


class _Status(ProgressColumn):
    """What has just been done, the time left, memory; below it what the running step does. Neither line wraps."""

    def __init__(self, progress: TerminalProgress, console: Console) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._progress, self._console = progress, console

    def render(self, task: Task) -> Text:
        """Both lines."""
        width = self._console.width
        room = width - min(len(task.description), _title_width(width)) - _bar_width(width) - 2
        inside = self._progress.substep_text(room - 2)
        return Text.assemble(self._progress.summary(room), (f"\n› {inside}" if inside else "", "dim"))


def _shortened(first: str, rest: str, width: int) -> str:
    """Both in one line: the first as far as there is room, the rest in any case."""
    whole = ", ".join(part for part in (first, rest) if part)
    if len(whole) <= width:
        return whole
    room = width - len(rest) - len("…, " if rest else "…")
    return f"{first[:room]}…{', ' if rest else ''}{rest}" if room > 0 else rest


class _Memory:
    """Resident memory of this process, now and at its highest."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._peak = 0

    def texts(self) -> tuple[str, str]:
        now = self._process.memory_info().rss
        self._peak = max(self._peak, now, _highest_so_far())
        return f"memory {size(now)}", f"peak {size(self._peak)}"


def _highest_so_far() -> int:
    """What the system remembers as the peak; 0 where it does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def counted(steps: int) -> str:
    """`1 step`, `12 steps`."""
    return f"{steps} step" + ("" if steps == 1 else "s")
