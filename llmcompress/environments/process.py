"""A program in a process of its own: few variables, its output heard, ended together with its children."""

from __future__ import annotations

import os
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from llmcompress.errors import without_tokens

Hear = Callable[[str], None]
"""Gets every line that a program writes, as soon as it is written."""

_KEPT = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP"),
        *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "WINDIR", "COMSPEC", "PATHEXT", "APPDATA"),
        *("LOCALAPPDATA", "PROGRAMDATA", "USERPROFILE", "NUMBER_OF_PROCESSORS", "HF_HOME", "HF_HUB_CACHE"),
    }
)
_KEPT_PREFIXES = ("LC_", "OMP_", "MKL_", "OPENBLAS_", "XDG_")
_FOR_INSTALLING = frozenset(
    {
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    }
)
_FOR_INSTALLING_PREFIXES = ("PIP_", "UV_")
_TAIL_LINES = 30
_SECONDS_TO_END = 5


@dataclass(frozen=True)
class Finished:
    """How a program ended."""

    code: int
    output: str
    """All that it wrote to its standard output and error, in the order of writing."""

    @property
    def tail(self) -> str:
        """The last lines, where programs say what is wrong."""
        lines = (line.rstrip() for line in self.output.splitlines() if line.strip())
        return without_tokens("\n".join(deque(lines, _TAIL_LINES)))


Call = Callable[[Sequence[str], Mapping[str, str], Hear], Finished]
"""Runs a command with exactly these variables; tests give one that installs nothing."""


def scrubbed(given: Mapping[str, str], *, installing: bool = False) -> dict[str, str]:
    """The variables a tool needs, and no others: no access token of any service, and no PYTHONPATH, which would bring
    the packages of another environment.

    `installing`: those too by which pip finds its index and gets through a proxy.
    """
    names = _KEPT | _FOR_INSTALLING if installing else _KEPT
    prefixes = _KEPT_PREFIXES + (_FOR_INSTALLING_PREFIXES if installing else ())
    return {name: value for name, value in given.items() if name.upper() in names or name.startswith(prefixes)}


def call(command: Sequence[str], variables: Mapping[str, str], hear: Hear, *, folder: Path | None = None) -> Finished:
    """Run it to its end. Whatever interrupts us, Ctrl-C included, ends it and all processes that it started."""
    process = subprocess.Popen(
        list(command),
        env=dict(variables),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=os.name != "nt",  # Ctrl-C reaches us alone, and we end it in order
    )
    assert process.stdout is not None
    lines = []
    try:
        with process.stdout:
            for line in process.stdout:
                lines.append(line)
                if line.strip():
                    hear(without_tokens(line.strip()))
        return Finished(process.wait(), "".join(lines))
    except BaseException:
        _end(process.pid)
        process.wait()
        raise


def _end(pid: int) -> None:
    """Ask a process and all below it to end, then make them."""
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for each in processes:
        _unless_gone(each.terminate)
    for each in psutil.wait_procs(processes, timeout=_SECONDS_TO_END)[1]:
        _unless_gone(each.kill)


def _unless_gone(action: Callable[[], None]) -> None:
    try:
        action()
    except psutil.NoSuchProcess:
        return
