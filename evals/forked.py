"""Commands as forks of a Python that has imported everything: processes of their own without the seconds of importing.

    with ForkServer({"HF_ENDPOINT": url}) as server:
        process = server.start(["push", "out", "me/out"], folder=place)
        process.send_signal(signal.SIGKILL)
        code, errors = process.ended()

The server has one thread and does nothing but fork. Variables that libraries read when they are imported are given to
the server, the others to a command.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

MODULES = (
    "torch",
    "transformers",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
    "compressed_tensors",
    "datasets",
    "gguf",
    "huggingface_hub.hf_api",
    "llmcompress.pipeline",
    "llmcompress.cli.compress",
    "llmcompress.cli.evaluate",
    "llmcompress.cli.export",
    "llmcompress.cli.push",
)


@dataclass
class Forked:
    """One command that runs or has run."""

    server: ForkServer
    pid: int
    errors: Path
    _code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, minus the number of the signal that killed it; None while it runs."""
        if self._code is None:
            self._code = self.server.ask({"code_of": self.pid})
        return self._code

    def wait(self, seconds: float) -> int | None:
        """Its exit code; None where it still runs after so many seconds."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._code

    def ended(self) -> tuple[int, str]:
        """Its exit code, and what it wrote to stderr."""
        while (code := self.wait(60.0)) is None:
            continue
        return code, self.errors.read_text(encoding="utf-8", errors="replace")

    def send_signal(self, number: signal.Signals) -> None:
        """To it and what it started; none where it has ended."""
        if self.poll() is None:
            os.killpg(self.pid, number)


class ForkServer:
    """Starts commands; ends with its block."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._errors = tempfile.TemporaryDirectory()
        self._started = 0

    def __enter__(self) -> Self:
        root = str(Path(__file__).resolve().parent.parent)
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **self._environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self._errors.cleanup()

    def start(
        self,
        words: Sequence[str],
        *,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        longest_file: int | None = None,
    ) -> Forked:
        """`llmcompress WORDS` in a folder; `longest_file`: bytes that the system lets it write into one file."""
        self._started += 1
        errors = Path(self._errors.name) / f"{self._started}.txt"
        asked = {
            "words": list(words),
            "folder": str(folder),
            "environment": dict(environment or {}),
            "errors": str(errors),
            "longest_file": longest_file,
        }
        return Forked(self, self.ask(asked), errors)

    def ask(self, what: dict[str, Any]) -> Any:
        """One request and its answer."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def serve() -> None:
    """Import, then answer every line with the number of a fork, or how one ended."""
    import importlib

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for name in MODULES:
        importlib.import_module(name)
    codes: dict[int, int] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "code_of" in asked:
            answer = _code_of(asked["code_of"], codes)
        else:
            answer = os.fork()
            if answer == 0:
                _run(asked)
            with contextlib.suppress(OSError):  # the fork does it too, and may have begun or even ended
                os.setpgid(answer, answer)
            codes.pop(answer, None)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _code_of(pid: int, codes: dict[int, int]) -> int | None:
    if pid not in codes:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            codes[pid] = os.waitstatus_to_exitcode(status)
    return codes.get(pid)


def _run(asked: Mapping[str, Any]) -> NoReturn:
    """The command, as a process group of its own that hears interrupts."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        for descriptor, path in ((0, os.devnull), (1, os.devnull), (2, asked["errors"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        if asked["longest_file"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (asked["longest_file"], asked["longest_file"]))
        from llmcompress.cli.main import main

        main(asked["words"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
