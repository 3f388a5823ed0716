"""`llmcompress passes`: all passes and their options."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from llmcompress.cli.output import json_option, print_json, print_tables

if TYPE_CHECKING:
    from rich.console import RenderableType


@click.command(short_help="List the passes a recipe can name, or explain one.")
@click.argument("name", required=False)
@json_option
def passes(name: str | None, as_json: bool) -> None:
    """List all passes, or explain pass NAME: what it does, its source, its options, their values and defaults.

    \b
    Examples:
      llmcompress passes
      llmcompress passes sparsegpt
    """
    from llmcompress.cli.option_text import COMMON, options
    from llmcompress.errors import CompressError, ExitCode, did_you_mean
    from llmcompress.recipe.catalogue import catalogue

    known = catalogue()
    if name is None:
        found = [{"name": each, "kind": text.kind, "summary": text.summary} for each, text in known.passes.items()]
        print_json(found) if as_json else print_tables(*_list(found))
        return
    if name not in known.passes:
        raise CompressError(
            "pass.unknown",
            f"unknown pass {name!r}",
            fix=did_you_mean(name, known.passes),
            exit_code=ExitCode.USAGE,
        )
    text = known.passes[name]
    of_pass = list(options(known.schema, known.options(name), text.names))
    if as_json:
        about = {"name": name, "kind": text.kind, "summary": text.summary, "description": text.description}
        print_json({**about, "options": of_pass})
        return
    own = [each for each in of_pass if each["name"].partition(".")[0] not in COMMON]
    common = [each for each in of_pass if each["name"].partition(".")[0] in COMMON]
    print_tables(*_explained(name, text.kind, text.description, own, common))


def _list(found: Iterable[dict[str, str]]) -> list[RenderableType]:
    from llmcompress.cli.tables import plain_table

    return [plain_table(("pass", "kind", "what it does"), [tuple(each.values()) for each in found])]


def _explained(
    name: str, kind: str, description: str, own: list[dict[str, Any]], common: list[dict[str, Any]]
) -> list[RenderableType]:
    from rich.text import Text

    title = Text.assemble((name, "bold"), f" ({kind})")
    shown: list[RenderableType] = [title, *(Text(part.replace("\n", " ")) for part in description.split("\n\n"))]
    for heading, of_kind in (("options", own), ("where it works", common)):
        if of_kind:
            shown.append(_option_list(heading, of_kind))
    return shown


def _option_list(heading: str, of_kind: list[dict[str, Any]]) -> RenderableType:
    """Two lines an option: what may be written, then what it means."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    lines: list[RenderableType] = [Text(heading, style="dim")]
    for each in of_kind:
        first = Text.assemble((each["name"], "bold"), f": {each['values']}", (f" (default {each['default']})", "dim"))
        lines += [Padding(first, (0, 0, 0, 2)), Padding(Text(each["description"]), (0, 0, 0, 6))]
    return Group(*lines)
