"""`llmcompress inspect`: the model map, and what cannot be compressed."""

from __future__ import annotations

import click

from llmcompress.cli.early import refuse_missing_models
from llmcompress.cli.libraries import loading_libraries, quiet_libraries
from llmcompress.cli.output import json_option, print_json, print_tables


@click.command(short_help="Show blocks, sites, folds, and what cannot be compressed.")
@click.argument("model")
@json_option
def inspect(model: str, as_json: bool) -> None:
    """Show the structure of MODEL: blocks, sites, shared inputs, folds, and what cannot be compressed and why.

    Start here with a new model family. Of a compressed model: what each site is. No weights are read.

    \b
    Examples:
      llmcompress inspect builtin:books-llama
      llmcompress inspect out --json
    """
    refuse_missing_models(model)
    quiet_libraries()
    from llmcompress.cli.tables import map_tables
    from llmcompress.cli.terminal import TerminalProgress

    with TerminalProgress() as progress:
        with loading_libraries(progress):
            from llmcompress.evaluation.inspection import inspect_folder
            from llmcompress.loading.source import find_source
        found = inspect_folder(find_source(model).folder)
    print_json(found) if as_json else print_tables(*map_tables(found))
