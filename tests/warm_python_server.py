"""A Python that imports what it is told to, once, and then runs every program it is sent in a fork of itself.

    python -P tests/warm_python_server.py MODULE ...

Standard library only. A line of JSON on its standard input is one program for one or several processes at once; a line
with their exit codes is the answer. It ends with its standard input, hence with the process that started it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
import types
from typing import Any, NoReturn

PATIENCE_SECONDS = 300
"""A program that takes longer hangs."""
GRACE_SECONDS = 5
"""How long the others of several processes may go on when one has failed: they wait for one that is gone."""


def main() -> None:
    """Import, say so, answer."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for name in sys.argv[1:]:
        importlib.import_module(name)
    answer(answers, sorted(sys.modules))
    for line in sys.stdin:
        request = json.loads(line)
        started = []
        for process in request["processes"]:
            child = os.fork()
            if child == 0:
                run(request["program"], process)
            started.append(child)
        answer(answers, wait(started))


def answer(answers: Any, what: Any) -> None:
    """One line."""
    answers.write(json.dumps(what) + "\n")
    answers.flush()


def run(program: str, process: dict[str, Any]) -> NoReturn:
    """The program as `python -c` would run it, in this fork."""
    code = 1
    try:
        for descriptor, path, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, process["out"], os.O_WRONLY | os.O_CREAT),
            (2, process["error"], os.O_WRONLY | os.O_CREAT),
        ):
            os.dup2(os.open(path, flags), descriptor)
        os.environ.update(process["environment"])
        os.chdir(process["folder"])
        sys.argv, sys.path[:0] = ["-c", *process["arguments"]], process["path"]
        sys.modules["__main__"] = here = types.ModuleType("__main__")
        exec(compile(program, "<program>", "exec"), here.__dict__)
        code = 0
    except SystemExit as end:
        if not isinstance(end.code, (int, type(None))):
            sys.stderr.write(f"{end.code}\n")
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(children: list[int]) -> list[int]:
    """The exit codes of all; what still runs some time after another has failed is killed, as torchrun does it."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    if codes[child]:
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[child] for child in children]


if __name__ == "__main__":
    main()
