"""Peak memory of a model in a fresh process that does nothing else; run as a program, it is that process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from llmcompress.evaluation.device.speed import random_prompt
from llmcompress.records.cost import Memory
from llmcompress.runners.base import RUNNERS

_OWN = Path("/proc/self")
_RESET = "5\n"
"""Written to `clear_refs`, it sets the high-water mark to what is resident now (proc(5))."""


@dataclass(frozen=True)
class MemoryRequest:
    """What the fresh process has to run."""

    model: str
    runtime: str
    device: str
    dtype: str
    threads: int
    settings: tuple[tuple[int, int], ...]
    """Batch size and context of every row."""
    new_tokens: int


def peak_memory(
    request: MemoryRequest, *, run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
) -> list[Memory]:
    """One record for every setting, in order; where the process fails they say how."""
    with tempfile.TemporaryDirectory(prefix="llmcompress-") as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-P", "-m", __name__, json.dumps(asdict(request)), str(answer)]
        # whatever this process can import, the fresh one can
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0 and answer.is_file():
            return [Memory.model_validate(row) for row in json.loads(answer.read_text())]
    return [Memory(instrument=None, unavailable=_failure(done))] * len(request.settings)


def _failure(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"the process that measures it was ended by signal {-done.returncode} (out of memory?)"
    last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
    return f"the process that measures it failed: {last[0]}"


def measure(request: MemoryRequest, *, proc: Path = _OWN) -> list[Memory]:
    """In this process: open the model, and run every setting."""
    device = torch.device(request.device)
    gauge: _Gauge = _GpuGauge(device) if device.type == "cuda" else _ResidentGauge(proc)
    torch.set_num_threads(request.threads)
    libraries = gauge.now()
    runner = RUNNERS[request.runtime].open(request.model, device=device, dtype=getattr(torch, request.dtype))
    found = []
    with runner:
        loading = gauge.peak()
        for batch, context in request.settings:
            prompt_BT = random_prompt(runner.vocabulary, batch=batch, tokens=context)
            gauge.reset()
            children = 0
            for _ in runner.stream(prompt_BT, max_new_tokens=request.new_tokens):
                children = max(children, gauge.children())
            found.append(_memory(gauge, libraries, loading, gauge.peak() + children))
    return found


def _memory(gauge: _Gauge, libraries: int, loading: int, running: int) -> Memory:
    if not running:
        return Memory(instrument=None, unavailable="this runtime does not allocate GPU memory through torch")
    return Memory(instrument=gauge.instrument, libraries=libraries, loading=loading, running=running)


class _Gauge(Protocol):
    instrument: str

    def reset(self) -> None:
        """From here on, `peak` is about what comes."""

    def peak(self) -> int:
        """Bytes at the most since the last reset."""

    def now(self) -> int:
        """Bytes at this moment."""

    def children(self) -> int:
        """Bytes, at this moment, of the processes that a runtime started."""


class _ResidentGauge:
    """Resident memory of this process, by its high-water mark."""

    def __init__(self, proc: Path) -> None:
        self._proc = proc
        self._before = {child.pid for child in psutil.Process().children(recursive=True)}
        self.instrument = "high-water mark of resident memory (VmHWM), reset before every row"
        self.reset()

    def reset(self) -> None:
        try:
            (self._proc / "clear_refs").write_text(_RESET)
        except OSError:
            self.instrument = "high-water mark of resident memory of the whole process: this system does not reset it"

    def peak(self) -> int:
        try:
            lines = (self._proc / "status").read_text().splitlines()
        except OSError:
            return _peak_of_process()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    def now(self) -> int:
        return int(psutil.Process().memory_info().rss)

    def children(self) -> int:
        total = 0
        for child in psutil.Process().children(recursive=True):
            if child.pid in self._before:
                continue
            try:
                total += child.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total


class _GpuGauge:
    """Bytes that torch allocated on a GPU, without what the driver and the libraries hold there."""

    instrument = "torch.cuda.max_memory_allocated"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def now(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def children(self) -> int:
        return 0


def _peak_of_process() -> int:
    """Where there is no /proc: Windows gives it to psutil, others to getrusage, in bytes on macOS."""
    info: Any = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: Sequence[str]) -> None:
    """The request as JSON, and the file for the answer."""
    wanted = json.loads(arguments[0])
    request = MemoryRequest(**{**wanted, "settings": tuple(map(tuple, wanted["settings"]))})
    Path(arguments[1]).write_text(json.dumps([row.model_dump() for row in measure(request)]))


if __name__ == "__main__":
    main(sys.argv[1:])
