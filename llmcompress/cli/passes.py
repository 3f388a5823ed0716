"""`llmcompress passes`: every algorithm that a recipe can name, and its options."""

from __future__ import annotations

import inspect as source
import json
from typing import Any

import click

from llmcompress.cli.output import json_option, print_json, print_tables, quiet_libraries


@click.command(short_help="List the passes, or explain one and its options.")
@click.argument("name", required=False)
@json_option
def passes(name: str | None, as_json: bool) -> None:
    """List every pass; with NAME explain it: what it does, its source, its options and their defaults.

    \b
    Examples:
      llmcompress passes
      llmcompress passes sparsegpt
    """
    quiet_libraries()
    from llmcompress.passes.base import PASSES

    if name is None:
        found = [_summary(each) for each in PASSES]
        if as_json:
            print_json(found)
            return
        from llmcompress.cli.tables import plain_table

        rows = [(each["name"], each["kind"], each["summary"]) for each in found]
        print_tables(plain_table(("pass", "kind", "what it does"), rows))
        return
    about = {**_summary(name), "description": source.cleandoc(PASSES[name].__doc__ or ""), "options": _options(name)}
    if as_json:
        print_json(about)
        return
    from llmcompress.cli.tables import plain_table

    click.echo(f"{about['description']}\n")
    rows = [(each["name"], each["default"], each["description"]) for each in about["options"]]
    print_tables(plain_table(("option", "default", "meaning"), rows))


def _summary(name: str) -> dict[str, Any]:
    """Name, folder and the first sentence of the docstring."""
    from llmcompress.passes.base import PASSES

    cls = PASSES[name]
    kind = cls.__module__.split(".")[2]
    return {
        "name": name,
        "kind": kind,
        "summary": source.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " "),
    }


def _options(name: str) -> list[dict[str, str]]:
    """The schema's own words, defaults as a recipe writes them."""
    from llmcompress.passes.base import PASSES

    properties = PASSES[name].model_json_schema()["properties"]
    return [
        {
            "name": option,
            "default": json.dumps(part.get("default"), ensure_ascii=False),
            "description": str(part.get("description", "")),
        }
        for option, part in properties.items()
    ]
