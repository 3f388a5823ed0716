"""`llmcompress allocate`: makes all allocation decisions of a recipe and writes them as an ordinary recipe."""

from __future__ import annotations

import os
from pathlib import Path

import click

from llmcompress.cli.early import refuse_mistakes
from llmcompress.cli.libraries import loading_libraries, quiet_libraries
from llmcompress.cli.output import device_option, json_option, print_json
from llmcompress.errors import CompressError, ExitCode, without_tokens


@click.command()
@click.argument("model", required=False)
@click.option(
    "--recipe", "recipe_file", metavar="FILE", required=True, type=click.Path(path_type=Path), help="Your recipe."
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the recipe to this file instead of stdout.",
)
@click.option(
    "--set", "settings", metavar="KEY=VALUE", multiple=True, help="Change one value of the recipe first. Repeatable."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@device_option
@json_option
def allocate(
    model: str | None,
    recipe_file: Path,
    output: Path | None,
    settings: tuple[str, ...],
    overwrite: bool,
    device: str,
    as_json: bool,
) -> None:
    """Make all allocation decisions of a recipe for MODEL, and write them as an ordinary recipe.

    Schemes (mixed_precision), ranks (svd), sparsities, units (width, bonsai) and blocks (depth) become options and
    overrides; running the written recipe gives the same weights.

    \b
    Examples:
      llmcompress allocate builtin:books-llama --recipe configs/tiny/mixed-precision.yaml
      llmcompress allocate --recipe mixed.yaml -o decided.yaml --set passes.mixed_precision.bits=3.0
    """
    if output is not None:
        _check_file(output, overwrite=overwrite)
    refuse_mistakes(recipe_file, settings, model=model)
    quiet_libraries()
    from llmcompress.cli.terminal import TerminalProgress

    with TerminalProgress() as progress:
        with loading_libraries(progress):
            from llmcompress.fixed_recipe import allocate as decide
            from llmcompress.recipe import read_recipe

        decided = decide(model, read_recipe(recipe_file, settings=settings), device=device, progress=progress)
    if output is not None:
        try:
            output.write_text(without_tokens(decided.to_yaml()), encoding="utf-8")
        except OSError as problem:
            raise _unwritable(output, str(problem.strerror)) from None
    if as_json:
        print_json(decided.model_dump(mode="json"))
    elif output is None:
        click.echo(without_tokens(decided.to_yaml()), nl=False)
    else:
        click.echo(str(output))


def _check_file(output: Path, *, overwrite: bool) -> None:
    """Before any work: that the recipe can be written there.

    Raises: CompressError for a file that exists, a folder, and a folder that is missing or read-only.
    """
    if output.is_dir():
        raise _unwritable(output, "it is a folder")
    if output.exists() and not overwrite:
        raise CompressError(
            "output.exists", f"{output} exists", fix="give another FILE, or add --overwrite", exit_code=ExitCode.USAGE
        )
    folder = output.resolve().parent
    if not folder.is_dir():
        raise _unwritable(output, f"the folder {folder} does not exist")
    if not os.access(output if output.exists() else folder, os.W_OK):
        raise _unwritable(output, "it is read-only")


def _unwritable(output: Path, why: str) -> CompressError:
    return CompressError(
        "output.unwritable", f"cannot write {output}: {why}", fix="give another FILE", exit_code=ExitCode.USAGE
    )
