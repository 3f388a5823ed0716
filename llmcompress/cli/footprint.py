"""`llmcompress footprint`: parameters and bytes of a saved model, on disk and in theory."""

from __future__ import annotations

import click

from llmcompress.cli.early import refuse_missing_models
from llmcompress.cli.libraries import loading_libraries, quiet_libraries
from llmcompress.cli.output import json_option, print_json, print_tables


@click.command(short_help="Count parameters and bytes, on disk and in theory.")
@click.argument("model")
@click.option("--against", metavar="OTHER", help="A second model to compare with.")
@json_option
def footprint(model: str, against: str | None, as_json: bool) -> None:
    """Count the parameters and bytes of MODEL, dense or compressed.

    A zero counts like any other number: only what takes fewer bytes in the files is smaller. What sparse storage and
    lossless codes could reach in theory is listed separately.

    \b
    Examples:
      llmcompress footprint builtin:books-llama
      llmcompress footprint out --against builtin:books-llama --json
    """
    quiet_libraries()
    from llmcompress.cli.tables import footprint_tables
    from llmcompress.cli.terminal import TerminalProgress

    models = [model] if against is None else [model, against]
    refuse_missing_models(*models)
    with TerminalProgress() as progress:
        with loading_libraries(progress):
            from llmcompress.evaluation.footprint import footprint as measure
            from llmcompress.evaluation.footprint import ratios
        found = [measure(name) for name in models]
    compared = ratios(*found) if len(found) == 2 else None
    if as_json:
        facts = [each.model_dump(mode="json") for each in found]
        print_json(facts[0] if compared is None else {"model": facts[0], "against": facts[1], "ratios": compared})
    else:
        print_tables(*footprint_tables(found, compared))
