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
    """Show how MODEL is built: blocks, sites, shared inputs, folds, and what cannot be compressed and why.

    The first help for a new family. No weights are read.

    \b
    Examples:
      llmcompress inspect builtin:books-llama
      llmcompress inspect Qwen/Qwen3-0.6B --json
    """
    quiet_libraries()
    from llmcompress.cli.tables import map_tables
    from llmcompress.cli.terminal import TerminalProgress

    with TerminalProgress() as progress:
        progress.stage("starting", 0)
        from llmcompress import pipeline

        found = pipeline.inspect(model)
    print_json(found) if as_json else print_tables(*map_tables(found))
