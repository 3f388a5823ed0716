"""Tokens per second of prefill and decode, measured so that runners can be compared: in turns, warm, medians."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from llmcompress.records.cost import Rate, Speed
from llmcompress.runners.base import Runner

SEED = 0

Clock = Callable[[], float]
ClockName = Literal["wall", "processor"]

CLOCKS: Mapping[ClockName, Clock] = {"wall": time.perf_counter, "processor": time.process_time}
"""Processor time, for a machine that is not idle, adds up what all threads of this process took: use one thread."""


def compare_speed(
    runners: Mapping[str, Runner],
    prompts: Mapping[str, Tensor],
    *,
    new_tokens: int = 32,
    repeats: int = 5,
    clock: ClockName | Clock = "wall",
) -> dict[str, Speed]:
    """Several runners in turns, each with its prompt B×T: what else happens on the machine happens to all alike.

    The first turn of each warms it up and is not counted. Processor time is for runners that compute in this process.
    """
    assert new_tokens > 1 and repeats > 0
    name, read = (clock, CLOCKS[clock]) if isinstance(clock, str) else ("wall", clock)
    seconds: dict[str, list[tuple[float, float]]] = {runner: [] for runner in runners}
    with _no_collection() as collect:
        for turn in range(repeats + 1):
            for runner_name, runner in runners.items():
                took = once(runner, prompts[runner_name], new_tokens, read)
                if turn:
                    seconds[runner_name].append(took)
            collect()
    return {runner: _speed(took, prompts[runner], new_tokens, name) for runner, took in seconds.items()}


def once(runner: Runner, prompt_BT: Tensor, new_tokens: int, clock: Clock) -> tuple[float, float]:
    """Seconds until the first new tokens, and for the ones after them."""
    prompt_BT = prompt_BT.to(runner.device)
    start = _now(runner.device, clock)
    steps = runner.stream(prompt_BT, max_new_tokens=new_tokens)
    next(steps)
    first = _now(runner.device, clock)
    for _ in steps:
        pass
    return first - start, _now(runner.device, clock) - first


def random_prompt(vocabulary: int, *, batch: int = 1, tokens: int = 128) -> Tensor:
    """Random token ids B×T: only their number matters, unless a model decides by its input what to compute."""
    return torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(SEED))


@contextmanager
def _no_collection() -> Iterator[Callable[[], int]]:
    """A garbage collection in the middle of a turn would be counted as the model's time; it runs between turns."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield gc.collect
    finally:
        if collecting:
            gc.enable()


def _now(device: torch.device, clock: Clock) -> float:
    """The time when all pending work of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return clock()


def _speed(seconds: Sequence[tuple[float, float]], prompt_BT: Tensor, new_tokens: int, clock: ClockName) -> Speed:
    batch = prompt_BT.shape[0]
    return Speed(
        prefill=Rate.of([prompt_BT.numel() / first for first, _ in seconds]),
        decode=Rate.of([batch * (new_tokens - 1) / rest for _, rest in seconds]),
        seconds_to_first_token=statistics.median(first for first, _ in seconds),
        clock=clock,
    )
