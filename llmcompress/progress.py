"""Progress reporting: stages, steps, notes, the time left; to an object, a callback, a bar, and the log."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from llmcompress.errors import CompressError, ExitCode, without_tokens

LOG = logging.getLogger("llmcompress")
"""Notes at level WARNING, stages at INFO, steps at DEBUG; silent until the user's program sets logging up."""

STEPS_FOR_ESTIMATE = 8
"""The time left comes from the latest steps: blocks restored from an interrupted run take no time."""


@runtime_checkable
class Progress(Protocol):
    """Two levels: a stage (compress, evaluate, save) and its steps, with the current substep."""

    def stage(self, title: str, steps: int) -> None:
        """Begin a stage of `steps` equal steps; it ends when the next begins or the run does."""

    def step(self, text: str) -> None:
        """One more step of the stage is done; `text` names it (`block 3/12`)."""

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        """What the current step is doing (`gptq: mlp.down_proj`), and how many of its equal parts are `done`.

        The display estimates the time left; 0 of 0: unknown.
        """

    def note(self, text: str) -> None:
        """One line that must stay visible: a fallback, a warning, a decision."""


class Silent:
    """Shows nothing: the default of the Python interface; `cli/terminal.py` has the one that people see."""

    def stage(self, title: str, steps: int) -> None:
        """Nothing."""

    def step(self, text: str) -> None:
        """Nothing."""

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class ProgressEvent:
    """The argument of a progress callback."""

    stage: str
    """`load`, `compress`, `save`, …"""
    step: int
    """Steps of the stage that are done."""
    total: int
    """Steps of the stage; 0: not known."""
    text: str
    """What was done last, or is being done: `block 3/12`, `gptq: mlp.down_proj`."""
    note: str
    """A fallback, a warning or a decision that should stay visible; empty in all other events."""
    seconds_left: float | None
    """Of the stage; None before its first step and at its end."""


Callback = Callable[[ProgressEvent], Any]
ProgressLike = Progress | Callback | Literal["bar"] | None
"""What the argument `progress` takes: an object with the four methods, a function of one event, or a bar (tqdm)."""


def as_progress(given: ProgressLike) -> Progress:
    """A `Progress` for a callback, `"bar"` or None, which also logs.

    Raises: CompressError for anything else.
    """
    if given is None:
        return Logged(Silent())
    if given == "bar":
        return Logged(Told(_Bar()))
    if isinstance(given, Logged):
        return given
    if isinstance(given, Progress):
        return Logged(given)
    if callable(given):
        return Logged(Told(given))
    raise CompressError(
        "progress.kind",
        f"{type(given).__name__} cannot show progress",
        fix='give a function of one event, "bar", or None',
        exit_code=ExitCode.USAGE,
    )


class Logged:
    """Forwards everything, and logs it."""

    def __init__(self, to: Progress) -> None:
        self._to = to

    def stage(self, title: str, steps: int) -> None:
        """At level INFO."""
        LOG.info("%s", without_tokens(f"{title} ({steps} steps)" if steps else title))
        self._to.stage(title, steps)

    def step(self, text: str) -> None:
        """At level DEBUG."""
        LOG.debug("%s", without_tokens(text))
        self._to.step(text)

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        """Not logged: there are thousands."""
        self._to.substep(text, done=done, total=total)

    def note(self, text: str) -> None:
        """At level WARNING."""
        LOG.warning("%s", without_tokens(text))
        self._to.note(text)


class Told:
    """Calls a callback."""

    def __init__(self, callback: Callback, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._callback, self._clock = callback, clock
        self._title, self._text, self._pace = "", "", Pace(clock, 0)

    def stage(self, title: str, steps: int) -> None:
        """An event without a text."""
        self._title, self._text, self._pace = title, "", Pace(self._clock, steps)
        self._tell()

    def step(self, text: str) -> None:
        """An event with one more step done."""
        self._pace.reach(self._pace.done + 1)
        self._text = text
        self._tell()

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        """An event with what is being done."""
        self._text = f"{text} {done}/{total}" if total else text
        self._tell()

    def note(self, text: str) -> None:
        """An event with the note."""
        self._tell(text)

    def _tell(self, note: str = "") -> None:
        pace = self._pace
        text, note = without_tokens(self._text), without_tokens(note)
        self._callback(ProgressEvent(self._title, pace.done, pace.total, text, note, pace.seconds_left))


class _Bar:
    """One bar of tqdm for each stage, in a notebook or a terminal; it comes with transformers."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""

    def __call__(self, event: ProgressEvent) -> None:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        if event.stage != self._stage or self._bar is None:
            if self._bar is not None:
                self._bar.close()
            self._stage, self._bar = event.stage, tqdm(total=event.total or None, desc=event.stage)
        self._bar.update(event.step - self._bar.n)
        self._bar.set_postfix_str(event.text)
        if event.note:
            tqdm.write(event.note)
        if event.total and event.step >= event.total:
            self._bar.close()


class Pace:
    """Progress, and the time left at the pace of the latest steps.

    rich estimates from all steps within a period, so blocks restored from an interrupted run would make it too
    optimistic.
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
