"""`llmcompress export`: a saved model as the files of another runtime."""

from __future__ import annotations

from pathlib import Path

import click

from llmcompress.cli.early import refuse_missing_models
from llmcompress.cli.libraries import loading_libraries, quiet_libraries
from llmcompress.cli.output import json_option, overwrite_option, print_json, print_tables


@click.command()
@click.argument("model")
@click.option(
    "--to", "targets", metavar="TARGET[,…]", multiple=True, required=True, help="See `llmcompress targets`. Repeatable."
)
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path),
    required=True,
    help="The folder to write; of several targets, the folder above theirs.",
)
@click.option(
    "--set",
    "settings",
    metavar="TARGET.OPTION=VALUE",
    multiple=True,
    help="An option of a target, e.g. --set gguf.instead=dense. Repeatable.",
)
@click.option(
    "--profile",
    type=click.Choice(["static-int8"]),
    help="Of the target onnx: fixed sizes and 8-bit integers in QDQ form (the target onnx_static_int8).",
)
@click.option("--no-run", is_flag=True, help="Do not run what was written in the target's own runtime.")
@click.option("--memory", is_flag=True, help="Also run it in a fresh process, and report the peak memory.")
@overwrite_option
@json_option
def export(
    model: str,
    targets: tuple[str, ...],
    output: Path,
    settings: tuple[str, ...],
    profile: str | None,
    no_run: bool,
    memory: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write MODEL, a folder that `compress` saved, for another runtime.

    Codes and scales are carried as they are, never rounded a second time. What was written is decoded again and
    compared with the model before the folder appears.

    \b
    Examples:
      llmcompress export out --to gguf -o out-gguf
      llmcompress export out --to gguf,plain -o exports --set gguf.instead=dense
      llmcompress export out --to onnx --profile static-int8 -o out-static --set onnx_static_int8.sequence=64
    """
    names = [name.strip() for group in targets for name in group.split(",") if name.strip()]
    if profile is not None:
        if "onnx" not in names:
            raise click.BadParameter("only the target onnx has profiles: add --to onnx", param_hint="--profile")
        names = [f"onnx_{profile.replace('-', '_')}" if name == "onnx" else name for name in names]
    options: dict[str, dict[str, str]] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        target, dot, option = key.partition(".")
        if not (equals and dot and option):
            raise click.BadParameter(f"{setting!r} is not TARGET.OPTION=VALUE", param_hint="--set")
        options.setdefault(target, {})[option] = value
    quiet_libraries()
    from llmcompress.cli.export_tables import export_table
    from llmcompress.cli.terminal import TerminalProgress

    refuse_missing_models(model)
    with TerminalProgress() as progress:
        with loading_libraries(progress):
            from llmcompress import model_export
        made = model_export.export(
            model,
            names,
            output,
            options=options,
            run=not no_run,
            memory=memory,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print_json({name: report.model_dump(mode="json") for name, report in made.items()})
    else:
        print_tables(export_table(made))
        click.echo(f"saved to {output}", err=True)
