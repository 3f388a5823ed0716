"""`llmcompress plan`: what `compress` would do, and whether it may; `compress --dry-run` under its own name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llmcompress.cli.compress import compress

SHARED = ("model", "preset", "recipe_file", "settings", "targets", "offload", "probe", "device", "as_json")
"""Arguments and options of `compress` that a plan depends on."""


@click.command(short_help="Show what `compress` would do: linears, bytes, memory, time, and what it would refuse.")
@click.option("-o", "--output", metavar="DIR", type=click.Path(path_type=Path), help="The folder it would write.")
@click.pass_context
def plan(context: click.Context, /, output: Path | None, **options: Any) -> None:
    """Show what `llmcompress compress` would do with the same words; nothing is written and no weight is read.

    Every linear with its passes and bits, bytes of the result, peak memory, time on this machine, risks, and what the
    model's license says of publishing the result. Whatever `compress` would refuse is refused here; of a recipe that
    publishes, the login and its rights are checked. With --probe a few blocks of each kind are read and compressed for
    real: the time is then no count of operations, but a measurement.

    \b
    Examples:
      llmcompress plan Qwen/Qwen3-0.6B --preset w4
      llmcompress plan Qwen/Qwen3-0.6B --preset w4 --probe
      llmcompress plan --recipe recipe.yaml --json
    """
    context.invoke(compress, output=output, dry_run=True, **options)


plan.params = [*(each for each in compress.params if each.name in SHARED), *plan.params]
