"""`llmcompress inspect`: the model map, and what cannot be compressed."""

from __future__ import annotations

import click

from llmcompress.cli.output import json_option, print_json, print_tables, quiet_libraries


@click.command(short_help="Show blocks, sites, folds, and what cannot be compressed.")
@click.argument("model")
@json_option
def inspect(model: str, as_json: bool) -> None:
    """Show the structure of MODEL: blocks, sites, shared inputs, folds, and what cannot be compressed and why.

    Start here with a new model family. No weights are read.

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
