"""`llmcompress report`: report.html, report.md and report.json of a folder that `compress` or `evaluate` wrote."""

from __future__ import annotations

from pathlib import Path

import click

from llmcompress.cli.output import json_option, print_json


@click.command(short_help="Write report.html, report.md and report.json of a saved result.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="DIR", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@json_option
def report(folder: Path, output: Path, as_json: bool) -> None:
    """Write the report of FOLDER, which `compress`, `evaluate`, `compare` or `export` wrote; nothing is measured.

    \b
    Example:
      llmcompress report out -o out-report
    """
    from llmcompress.report.folder import is_export, is_report, read_reported, write_report
    from llmcompress.report.saved import evaluation_of_result

    found = read_reported(folder) if is_report(folder) or is_export(folder) else evaluation_of_result(folder)
    write_report(found, output)
    print_json({"output": str(output)}) if as_json else click.echo(f"report written to {output}", err=True)
