"""Processes that cost no import of torch: each is a fork of a Python that has imported the libraries, and no more.

A fork has the modules of its parent and nothing else that an earlier program did, so "a fresh process with stock
libraries" stays true of it. Nothing is forked from the test process itself, which has threads.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
STOCK = (
    "torch",
    "transformers.modeling_utils",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
    "compressed_tensors",
)
"""What a user has who never heard of us."""
OURS = (*STOCK, "llmcompress.pipeline", "llmcompress.recipe")

Done = subprocess.CompletedProcess[str]


class WarmPython:
    """Runs programs as `python -c` would."""

    def __init__(self, modules: Sequence[str], *, with_us: bool) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._server = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("warm_python_server.py")), *modules],
            env={**environment, **({"PYTHONPATH": str(ROOT)} if with_us else {}), "OMP_NUM_THREADS": "1"},
            cwd=tempfile.gettempdir(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.modules: list[str] = self._answer()

    def run(self, program: str, *arguments: object, imports_us: bool = False, folder: Path | None = None) -> Done:
        """One process; `imports_us` lets it find this copy of llmcompress."""
        return self._run(program, arguments, [{}], imports_us, folder)[0]

    def run_ranks(self, program: str, *arguments: object, count: int, folder: Path) -> list[Done]:
        """Several processes that find each other, as those that torchrun starts."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [
            {name: str(value) for name, value in {**together, "RANK": rank, "LOCAL_RANK": rank}.items()}
            for rank in range(count)
        ]
        return self._run(program, arguments, ranks, True, folder)

    def cpu_seconds(self) -> float:
        """What it and its programs have used."""
        times = psutil.Process(self._server.pid).cpu_times()
        return float(times.user + times.system + times.children_user + times.children_system)

    def close(self) -> None:
        """End it; its programs have ended."""
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def _run(
        self,
        program: str,
        arguments: Sequence[object],
        environments: list[dict[str, str]],
        imports_us: bool,
        folder: Path | None,
    ) -> list[Done]:
        words = [str(word) for word in arguments]
        with tempfile.TemporaryDirectory() as place:
            processes = [
                {
                    "arguments": words,
                    "environment": environment,
                    "folder": str(folder or place),
                    "path": [str(ROOT)] if imports_us else [],
                    "out": f"{place}/{number}.out",
                    "error": f"{place}/{number}.error",
                }
                for number, environment in enumerate(environments)
            ]
            codes = self._ask({"program": program, "processes": processes})
            return [
                Done(words, code, Path(process["out"]).read_text(), Path(process["error"]).read_text())
                for code, process in zip(codes, processes, strict=True)
            ]

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._server.stdout
        line = self._server.stdout.readline()
        assert line, "the process that forks has died; its last words are above"
        return json.loads(line)


def stock() -> WarmPython:
    """One that has never imported llmcompress, and cannot by accident."""
    python = WarmPython(STOCK, with_us=False)
    assert not [name for name in python.modules if name.partition(".")[0] in ("llmcompress", "tests")]
    return python


def ours() -> WarmPython:
    """One that has imported us too."""
    return WarmPython(OURS, with_us=True)
