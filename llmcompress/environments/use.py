"""Which interpreter runs a tool, and running it there: offline, without tokens, with its output as progress."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmcompress.environments.building import VirtualEnvironment
from llmcompress.environments.installed import unsatisfied
from llmcompress.environments.known import Environment
from llmcompress.environments.process import Call, call, scrubbed
from llmcompress.errors import CompressError
from llmcompress.progress import Progress

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
_SHOWN = 80


def is_here(environment: Environment) -> bool:
    """Whether the running interpreter satisfies it."""
    return not unsatisfied(environment.requirements)


def python(environment: Environment, *, progress: Progress, call: Call = call) -> Path:
    """The interpreter that has what the environment requires: the running one, or that of a virtual environment in
    the cache, which is built the first time.

    Raises: CompressError when it cannot be built.
    """
    if is_here(environment):
        return Path(sys.executable)
    place = VirtualEnvironment(environment)
    place.build(progress=progress, call=call)
    return place.python


def run(
    environment: Environment,
    arguments: Sequence[str],
    *,
    doing: str,
    progress: Progress,
    folder: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Run `python ARGUMENTS` in it and return what was written; `doing` says in a word what for.

    The process gets a few variables of ours, `variables` besides, and reaches no hub. It ends with us.

    Raises: CompressError with the end of its output when it fails.
    """
    interpreter = python(environment, progress=progress)
    given = scrubbed(os.environ) | _OFFLINE | {"PYTHONUNBUFFERED": "1"}
    if interpreter == Path(sys.executable):  # what satisfies the environment may be there
        given |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    command = [str(interpreter), *arguments]

    def hear(line: str) -> None:
        progress.substep(f"{doing}: {line[:_SHOWN]}")

    done = call(command, {**given, **(variables or {})}, hear, folder=folder)
    if done.code:
        raise CompressError(
            "environment.run",
            f"{doing} failed in the environment {environment.name}:\n{done.tail}",
            where=f"{shlex.join(command)} (exit code {done.code})",
            fix="the text above is what the tool says; `llmcompress doctor` shows the environment",
        )
    return done.output
