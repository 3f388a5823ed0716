"""`llmcompress recipes`: the recipes that come with the package."""

from __future__ import annotations

from pathlib import Path

import click

from llmcompress.cli.output import json_option, print_json, print_tables
from llmcompress.errors import CompressError, ExitCode


@click.group()
def recipes() -> None:
    """List, show or copy the recipes that come with the package."""


@recipes.command("ls")
@json_option
def list_recipes(as_json: bool) -> None:
    """List the presets for `--preset`."""
    from llmcompress.presets import paper_names, preset_names, preset_summary

    summaries = {name: preset_summary(name) for name in (*preset_names(), *paper_names())}
    if as_json:
        print_json([{"name": name, "summary": summary} for name, summary in summaries.items()])
        return
    from llmcompress.cli.tables import plain_table

    print_tables(plain_table(("preset", "what it does"), list(summaries.items())))


@recipes.command("show")
@click.argument("name")
@json_option
def show_recipe(name: str, as_json: bool) -> None:
    """Print preset NAME; with --json the recipe with all defaults written out."""
    from llmcompress.presets import load_preset, preset_path

    if as_json:
        print_json(load_preset(name).model_dump(mode="json"))
    else:
        click.echo(preset_path(name).read_text(encoding="utf-8"), nl=False)


@recipes.command("copy")
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@json_option
def copy_recipe(name: str, file: Path | None, overwrite: bool, as_json: bool) -> None:
    """Copy preset NAME to FILE (./NAME.yaml), to edit and use with --recipe."""
    from llmcompress.presets import preset_path

    source = preset_path(name)
    target = file or Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.exists() and not overwrite:
        raise CompressError(
            "output.exists",
            f"{target} exists",
            fix="give another FILE, or add --overwrite",
            exit_code=ExitCode.USAGE,
        )
    try:
        target.write_bytes(source.read_bytes())
    except OSError as problem:
        raise CompressError(
            "output.unwritable",
            f"cannot write {target}: {problem.strerror}",
            fix="give another FILE",
            exit_code=ExitCode.USAGE,
        ) from None
    print_json({"file": str(target)}) if as_json else click.echo(str(target))
