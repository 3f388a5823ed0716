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
