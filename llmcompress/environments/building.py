"""Builds the virtual environment of a tool, once: complete or absent, with a CPU build of torch, reused afterwards."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from llmcompress.environments.known import CPU_TORCH, Environment
from llmcompress.environments.process import Call, Finished, scrubbed
from llmcompress.errors import CompressError, ExitCode
from llmcompress.progress import Progress
from llmcompress.storage.atomic import replacing
from llmcompress.storage.paths import cache_folder

_STAMP = "llmcompress-stamp.json"
"""Written last: a folder without it was killed while it was built, and is built again from the start."""
_STEPS = 3
_NETWORK = (
    *("NewConnectionError", "ConnectTimeout", "ReadTimeout", "ProxyError", "NameResolutionError", "SSLError"),
    *("Temporary failure in name resolution", "Failed to establish", "Connection refused", "error sending request"),
)
"""How pip and uv say that they did not reach the index."""


@dataclass(frozen=True)
class VirtualEnvironment:
    """The folder of an environment that the running interpreter does not satisfy."""

    environment: Environment

    @property
    def folder(self) -> Path:
        """Below the cache."""
        return cache_folder() / "environments" / self.environment.key

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.program("python")

    @property
    def is_complete(self) -> bool:
        """Whether it was built to the end, and still is there."""
        return (self.folder / _STAMP).is_file() and self.python.exists()

    def program(self, name: str) -> Path:
        """Path of a program in it."""
        windows = os.name == "nt"
        return self.folder / ("Scripts" if windows else "bin") / (f"{name}.exe" if windows else name)

    def build(self, *, progress: Progress, call: Call) -> None:
        """Build it where it is not complete; another process that builds it is waited for.

        Raises: CompressError with the command that failed and the one to repeat.
        """
        if self.is_complete:
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder.with_name(f"{self.folder.name}.lock"), thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress.note(f"another process is building the environment {self.environment.name}; waiting for it")
            lock.acquire()
        try:
            if not self.is_complete:
                _Build(self, progress, call).run()
        finally:
            lock.release()


@dataclass(frozen=True)
class _Build:
    """One attempt."""

    place: VirtualEnvironment
    progress: Progress
    call: Call

    def run(self) -> None:
        environment, folder = self.place.environment, self.place.folder
        self.progress.note(
            f"building the environment {environment.name} once, {environment.purpose}: gigabytes, and minutes; "
            f"it is kept in {folder}"
        )
        shutil.rmtree(folder, ignore_errors=True)
        self._step(1, "creating", [sys.executable, "-m", "venv", str(folder)])
        self._install_torch()
        constraints = folder / "llmcompress-constraints.txt"
        constraints.write_text("\n".join([CPU_TORCH, *environment.pins]) + "\n", encoding="utf-8")
        install = self._pip("install", "--constraint", str(constraints), *environment.requirements)
        self._step(3, "packages", install)
        with replacing(folder / _STAMP) as part:
            part.write_text(json.dumps({"environment": environment.name, "requirements": environment.requirements}))

    def _install_torch(self) -> None:
        """First, and pinned for all that follows: any later requirement could otherwise bring gigabytes of CUDA."""
        dry_run = self._pip("install", "--dry-run", "--quiet", "--report", "-", CPU_TORCH)
        asked = self._call(2, "torch", dry_run)
        if asked.code == 0 and not _names_cuda(asked.output):
            self._step(2, "torch", self._pip("install", CPU_TORCH))
            return
        self._step(2, "uv, which knows where CPU builds of torch are", self._pip("install", "uv"))
        uv = [str(self.place.program("uv")), "pip", "install", "--python", str(self.place.python)]
        self._step(2, "torch", [*uv, "--torch-backend", "cpu", CPU_TORCH])

    def _pip(self, *arguments: str) -> list[str]:
        options = ("--disable-pip-version-check", "--no-input", "--progress-bar", "off")
        first, *rest = arguments
        return [str(self.place.python), "-m", "pip", first, *options, *rest]

    def _step(self, number: int, what: str, command: Sequence[str]) -> None:
        done = self._call(number, what, command)
        if done.code:
            raise _failed(self.place, command, done)

    def _call(self, number: int, what: str, command: Sequence[str]) -> Finished:
        # from steps of so different lengths no time can be estimated: they are numbered, not counted
        title = f"environment {self.place.environment.name}, {number} of {_STEPS}: {what}"

        def hear(line: str) -> None:
            self.progress.substep(f"{title}: {line[:60]}")

        self.progress.substep(title)
        try:
            return self.call(command, _variables(os.environ), hear)
        except OSError as problem:
            raise _failed(self.place, command, Finished(1, str(problem))) from problem


def build_command(environment: Environment) -> str:
    """What a user types to build it, or to try again."""
    return f"llmcompress doctor --build {environment.name}"


def _variables(given: Mapping[str, str]) -> dict[str, str]:
    return {**scrubbed(given, installing=True), "PYTHONNOUSERSITE": "1"}


def _names_cuda(report: str) -> bool:
    """Whether pip would install packages of CUDA; a report that cannot be read counts as yes."""
    try:
        items = json.loads(report[report.index("{") :])["install"]
        names = [str(item["metadata"]["name"]).lower() for item in items]
    except (ValueError, KeyError, TypeError):
        return True
    return any(name.startswith(("nvidia", "cuda", "triton")) for name in names)


def _failed(place: VirtualEnvironment, command: Sequence[str], done: Finished) -> CompressError:
    said = done.output
    if "No space left" in said or "Disk quota exceeded" in said:
        code, what, exit_code = "disk-full", "the disk is full", ExitCode.RESOURCES
    elif any(word in said for word in _NETWORK):
        code, what, exit_code = "network", "the package index was not reached", ExitCode.HUB
    else:
        code, what, exit_code = "build", "a command failed", ExitCode.REFUSED
    name = place.environment.name
    return CompressError(
        f"environment.{code}",
        f"the environment {name} could not be built: {what}\n{done.tail}",
        where=f"{shlex.join(command)} (exit code {done.code})",
        fix=f"run `{build_command(place.environment)}`; or install the requirements where llmcompress runs: "
        f"pip install {shlex.join(place.environment.requirements)}",
        saved="nothing of the environment; the next attempt starts over",
        exit_code=exit_code,
    )
