"""`llmcompress resume`: goes on with a run that was interrupted, without its command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llmcompress.cli.compress import compress
from llmcompress.cli.output import device_option, json_option, offload_option, overwrite_option, yes_option
from llmcompress.errors import CompressError, ExitCode

_SUFFIX = ".run"


@click.command()
@click.argument("run", metavar="OUTPUT", type=click.Path(path_type=Path))
@overwrite_option
@yes_option
@offload_option
@device_option
@json_option
@click.pass_context
def resume(context: click.Context, /, run: Path, **options: Any) -> None:
    """Finish an interrupted `compress` that was to write OUTPUT.

    The recipe is the one that the run began with, from the folder OUTPUT.run, which may also be given itself.

    \b
    Example:
      llmcompress resume Qwen3-0.6B-w4
    """
    folder = run if run.name.endswith(_SUFFIX) else run.with_name(f"{run.name}{_SUFFIX}")
    recipe, output = folder / "lock.yaml", folder.with_name(folder.name.removesuffix(_SUFFIX))
    if not recipe.is_file():
        finished = output.is_dir()
        raise CompressError(
            "run.none",
            f"there is no unfinished run for {output}" + (", which is complete" if finished else ""),
            where=str(folder),
            fix=f"use {output}" if finished else "give the output folder of the interrupted command",
            saved="everything, as it was",
            exit_code=ExitCode.USAGE,
        )
    context.invoke(compress, recipe_file=recipe, output=output, settings=(), targets=(), **options)
