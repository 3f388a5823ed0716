"""Joules per token above idle, from a counter of the machine; where none can be read, the reason."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from llmcompress.evaluation.device.instruments import Instrument, Unreadable
from llmcompress.evaluation.device.speed import Clock, once
from llmcompress.records.cost import Energy
from llmcompress.runners.base import Runner


@dataclass(frozen=True)
class Watch:
    """A counter, and how time passes while it is read."""

    instrument: Instrument
    clock: Clock = time.perf_counter
    sleep: Callable[[float], None] = time.sleep


def measure_energy(watch: Watch, runner: Runner, prompt_BT: Tensor, *, new_tokens: int) -> Energy:
    """Idle, then nothing but prefills, then whole generations, then idle again: each long enough for the counter.

    What decoding took is the difference of the two, so that the steps of the counter never have to be shorter than a
    prefill. Idle power is the mean of before and after; where it differs by more than the model adds, there is no
    result.
    """
    instrument = watch.instrument
    try:
        before = _idle_watts(watch)
        prefill = _repeated(watch, lambda: once(runner, prompt_BT, 1, watch.clock))
        whole = _repeated(watch, lambda: once(runner, prompt_BT, new_tokens, watch.clock))
        after = _idle_watts(watch)
    except Unreadable as problem:
        return Energy(instrument=None, unavailable=str(problem))
    idle = (before + after) / 2
    prefill_joules, whole_joules = (each.joules_above(idle) for each in (prefill, whole))
    found = Energy(
        instrument=instrument.name,
        idle_watts=(before, after),
        busy_watts=whole.joules / whole.seconds,
        seconds=prefill.seconds + whole.seconds,
    )
    if min(prefill_joules, whole_joules - prefill_joules, whole.watts - idle - abs(after - before)) <= 0:
        reason = "idle power varied by more than the model adds: something else uses the machine"
        return found.model_copy(update={"unavailable": reason})
    decoded = prompt_BT.shape[0] * (new_tokens - 1)
    return found.model_copy(
        update={
            "prefill_joules_per_token": prefill_joules / prompt_BT.numel(),
            "decode_joules_per_token": (whole_joules - prefill_joules) / decoded,
        }
    )


@dataclass(frozen=True)
class _Reading:
    joules: float
    seconds: float
    runs: int

    @property
    def watts(self) -> float:
        return self.joules / self.seconds

    def joules_above(self, idle_watts: float) -> float:
        """Of one run."""
        return (self.joules - idle_watts * self.seconds) / self.runs


def _idle_watts(watch: Watch) -> float:
    return _repeated(watch, lambda: watch.sleep(watch.instrument.least_seconds)).watts


def _repeated(watch: Watch, run: Callable[[], object]) -> _Reading:
    """As often as it takes until the counter has been read for long enough."""
    joules, start, runs = watch.instrument.joules(), watch.clock(), 0
    while (seconds := watch.clock() - start) < watch.instrument.least_seconds:
        run()
        runs += 1
    return _Reading(watch.instrument.joules() - joules, seconds, runs)
