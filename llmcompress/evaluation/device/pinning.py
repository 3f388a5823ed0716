"""Keeps a measurement on chosen cores with a chosen number of threads, and undoes it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_CORES = Path("/sys/devices/system/cpu")
_OWN_THREADS = Path("/proc/self/task")


@dataclass(frozen=True)
class Pinning:
    """What was done."""

    threads: int
    """Of torch."""
    cores: tuple[int, ...] | None
    """Where all threads of this process run; None: not pinned."""
    reason: str = ""
    """Why not."""


@contextmanager
def pinned(threads: int | None = None) -> Iterator[Pinning]:
    """This many threads of torch (None: as many as it has) on as many cores, one per physical core where possible.

    Threads and child processes started inside stay there too. Nothing is pinned where the system cannot, or where
    there are no more cores than threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    count = torch.get_num_threads()
    try:
        if not hasattr(os, "sched_setaffinity"):
            yield Pinning(count, None, "this system has no call for it")
            return
        allowed = os.sched_getaffinity(0)
        chosen = cores_for(count, sorted(allowed))
        if set(chosen) == allowed:
            yield Pinning(count, None, f"{count} threads and {len(allowed)} cores")
            return
        own = _keep_on(set(chosen))
        try:
            yield Pinning(count, chosen)
        finally:
            _keep_on(allowed, own)
    finally:
        torch.set_num_threads(before)


def cores_for(threads: int, allowed: Sequence[int], *, root: Path = _CORES) -> tuple[int, ...]:
    """The first cores that share nothing with one another, then those that do (hyper-threads)."""
    siblings = [_siblings(core, root) for core in allowed]
    alone = [core for core, group in zip(allowed, siblings, strict=True) if core == min(group & set(allowed))]
    order = [*alone, *(core for core in allowed if core not in alone)]
    return tuple(sorted(order[:threads]))


def _siblings(core: int, root: Path) -> set[int]:
    """Logical cores on the same physical one, itself included: `0,4` or `0-1`."""
    try:
        text = (root / f"cpu{core}" / "topology" / "thread_siblings_list").read_text()
    except OSError:
        return {core}
    found = {core}
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _keep_on(cores: set[int], each: dict[int, set[int]] | None = None) -> dict[int, set[int]]:
    """Every thread of this process on `cores`, or on its own of `each`; what they were on before."""
    before = {}
    for thread in [int(path.name) for path in _OWN_THREADS.iterdir()]:
        try:
            before[thread] = os.sched_getaffinity(thread)
            os.sched_setaffinity(thread, (each or {}).get(thread, cores))
        except ProcessLookupError:  # it ended in between
            continue
    return before
