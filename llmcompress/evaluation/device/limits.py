"""What this machine reaches at best: memory bandwidth and the rate of a matrix product, by short microbenchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from llmcompress.evaluation.device.speed import CLOCKS, Clock, ClockName
from llmcompress.records.cost import MachineLimits

_ARRAY_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Several times the last cache of most processors; arrays of a GPU are larger, since its kernels take time to start."""
_SIDE = {"cpu": 2048, "cuda": 8192}
_LEAST_REPEATS = 3
_SECONDS = 0.7
"""Repeats go on for that long: short enough for every command, long enough to see an undisturbed one."""


@cache
def machine_limits(device: torch.device, dtype: torch.dtype, threads: int, clock: ClockName = "wall") -> MachineLimits:
    """Bandwidth, and matrix rate in that dtype, with the threads that torch has now; measured once per process.

    `threads` is not set here: it tells results with different settings apart.
    """
    kind = "cpu" if device.type == "cpu" else "cuda"
    read = CLOCKS[clock]
    with torch.inference_mode():
        return MachineLimits(
            device=device_name(device),
            threads=threads,
            dtype=str(dtype).removeprefix("torch."),
            bytes_per_second=bandwidth(device, _ARRAY_BYTES[kind], read),
            flops_per_second=matrix_rate(device, dtype, _SIDE[kind], read),
        )


def bandwidth(device: torch.device, array_bytes: int, clock: Clock) -> float:
    """Bytes per second of the fastest of three kernels: which one is differs between machines.

    What the triad writes counts once; that a processor may read a line before it writes it does not count.
    """
    x, y, out = (torch.ones(array_bytes // 4, device=device) for _ in range(3))
    kernels: list[tuple[int, Callable[[], Tensor]]] = [
        (x.nbytes, x.view(torch.int32).sum),
        (2 * x.nbytes, lambda: torch.dot(x, y)),
        (3 * x.nbytes, lambda: torch.add(x, y, alpha=2.0, out=out)),
    ]
    return max(moved / fastest(kernel, device, clock) for moved, kernel in kernels)


def matrix_rate(device: torch.device, dtype: torch.dtype, side: int, clock: Clock) -> float:
    """FLOP/s of a square product; a multiply-add is two."""
    a, b, out = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(3))
    return float(2 * side**3 / fastest(lambda: torch.mm(a, b, out=out), device, clock))


def fastest(kernel: Callable[[], Tensor], device: torch.device, clock: Clock) -> float:
    """Seconds of the shortest repeat after a warm-up: a limit is what an undisturbed machine reaches."""
    took: list[float] = []
    begun = time.perf_counter()
    while len(took) <= _LEAST_REPEATS or time.perf_counter() - begun < _SECONDS:
        start = clock()
        kernel()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        took.append(clock() - start)
    return min(took[1:])


def device_name(device: torch.device) -> str:
    """`cpu`, or what the accelerator calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
