"""The command `llmcompress`: one file per command, imported on use; nothing heavy loads before a command runs."""

from __future__ import annotations

import importlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import click

from llmcompress import __version__
from llmcompress.cli.failures import report_failure
from llmcompress.errors import did_you_mean

COMMANDS = (
    "allocate",
    "compare",
    "compress",
    "distill",
    "doctor",
    "evaluate",
    "export",
    "footprint",
    "inspect",
    "passes",
    "plan",
    "push",
    "recipes",
    "report",
    "resume",
    "schema",
    "search",
    "speed",
    "targets",
    "verify",
)


class LazyGroup(click.Group):
    """Finds a command `name` as `llmcompress.cli.name.name`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All of them, without importing any."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the file of one command."""
        if cmd_name not in COMMANDS:
            return None
        found = getattr(importlib.import_module(f"llmcompress.cli.{cmd_name}"), cmd_name)
        assert isinstance(found, click.Command)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it, with the nearest name for one that does not exist."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"No such command '{args[0]}': {did_you_mean(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 ok, 1 bug, 2 usage or recipe, 3 model or data refused, 4 out of memory or disk, "
    "5 Hub or network, 6 quality gate, 130 interrupted, 143 terminated.",
)
@click.version_option(__version__, prog_name="llmcompress")
def llmcompress() -> None:
    """Compress a causal language model, and measure what it costs in quality.

    \b
    Try it without a network, in under a minute:
      llmcompress compress builtin:books-llama --preset tiny/gptq -o out
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; every failure ends here as an exit code and a short text."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _terminated_as_interrupted() as terminated:
            code = llmcompress.main(given, prog_name="llmcompress", standalone_mode=False)
    except Exception as failure:
        code = report_failure(failure, as_json="--json" in given, terminated=bool(terminated))
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _terminated_as_interrupted() -> Iterator[list[int]]:
    """A polite end (SIGTERM, from a scheduler or `kill`) is told like Ctrl-C, with what is saved and how to go on.

    Gives the signals that came.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield received
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
