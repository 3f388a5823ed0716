"""`llmcompress verify`: whether a saved or published model is what was written."""

from __future__ import annotations

import click

from llmcompress.cli.early import refuse_missing_models
from llmcompress.cli.libraries import loading_libraries, quiet_libraries
from llmcompress.cli.output import json_option, print_json, print_tables


@click.command(short_help="Check a saved or published model: files, tensors, recipe, and with --deep its logits.")
@click.argument("model")
@click.option("--deep", is_flag=True, help="Also load it in a fresh process and compare its logits.")
@json_option
def verify(model: str, deep: bool, as_json: bool) -> None:
    """Check MODEL: a folder that llmcompress wrote, or a repository on the Hub that it published.

    Digests of all files; names and shapes of all tensors against config.json; NaN and Inf; recipe against report. With
    --deep a fresh process loads it, and its logits are compared with those of the stored codes. Ends with exit code 6
    if something does not hold.

    \b
    Examples:
      llmcompress verify out --deep
      llmcompress verify me/Qwen3-0.6B-w4 --json
    """
    refuse_missing_models(model)
    quiet_libraries()
    from llmcompress.cli.tables import plain_table
    from llmcompress.cli.terminal import TerminalProgress

    with TerminalProgress() as progress:
        with loading_libraries(progress):
            from llmcompress.verification.verifying import failure_of
            from llmcompress.verification.verifying import verify as checked
        progress.stage("verify", 0)
        found = checked(model, deep=deep)
    if as_json:
        print_json({**found.model_dump(mode="json"), "ok": not found.failed})
    else:
        rows = [(each.title, each.result, "; ".join([each.found, *each.where])) for each in found.checks]
        print_tables(plain_table(("check", "", "found"), rows))
    failure = failure_of(found, saved=f"{model}, as it is")
    if failure is not None:
        if as_json:
            click.echo(str(failure), err=True)
            click.get_current_context().exit(int(failure.exit_code))
        raise failure
