"""Output: results on stdout, everything else on stderr; and the options that several commands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llmcompress.errors import without_tokens

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmcompress.records.evaluation import Measured

F = TypeVar("F", bound=Callable[..., Any])

WIDTH_OF_PIPES = 120


def json_option(command: F) -> F:
    """`--json`: one JSON value on stdout, also for errors."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON value on stdout, errors included.")(
        command
    )


def device_option(command: F) -> F:
    """`--device`."""
    return click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")(command)


def overwrite_option(command: F) -> F:
    """`--overwrite`."""
    return click.option("--overwrite", is_flag=True, help="Replace an existing output, once the new one is complete.")(
        command
    )


def yes_option(command: F) -> F:
    """`--yes`."""
    return click.option(
        "--yes", is_flag=True, help="Do not ask for confirmation before running code from a model's repository."
    )(command)


def offload_option(command: F) -> F:
    """`--offload`."""
    return click.option(
        "--offload",
        type=click.Choice(["auto", "always", "never"]),
        default="auto",
        show_default=True,
        help="Offload weights to disk, one block in memory (auto: if the model does not fit). Same result.",
    )(command)


def track_option(command: F) -> F:
    """`--track`."""
    return click.option(
        "--track",
        "tracker",
        metavar="NAME",
        help="Log every number to trackio, wandb, tensorboard or mlflow [default: nothing is sent].",
    )(command)


def fail_by_gate(measured: Measured, *, as_json: bool, saved: str) -> None:
    """End with exit code 6 if the quality gate is not kept; the result stands on stdout already.

    Raises: CompressError, which is told on stderr; with `as_json` stdout has its one value, and only the code is given.
    """
    from llmcompress.evaluation.gate import gate_failure

    failure = gate_failure(measured, saved=f"{saved}; it is not published")
    if failure is None:
        return
    if as_json:
        click.echo(str(failure), err=True)
        click.get_current_context().exit(int(failure.exit_code))
    raise failure


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    click.echo(without_tokens(json.dumps(value, indent=2, ensure_ascii=False)))


def print_tables(*tables: RenderableType) -> None:
    """Tables on stdout; colours only on a terminal and without NO_COLOR."""
    from rich.console import Console

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH_OF_PIPES, highlight=False)
    for index, table in enumerate(tables):
        if index:
            console.print()
        console.print(table)
