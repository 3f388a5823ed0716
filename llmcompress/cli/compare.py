"""`llmcompress compare`: several models, or saved evaluations, beside the same dense model."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmcompress.cli.early import refuse_missing_models, refuse_missing_texts
from llmcompress.cli.evaluate import command_line
from llmcompress.cli.libraries import loading_libraries, quiet_libraries
from llmcompress.cli.metrics import Words, metric_options, settings_of
from llmcompress.cli.output import device_option, json_option, print_json, print_tables, track_option
from llmcompress.errors import CompressError, ExitCode

if TYPE_CHECKING:
    from llmcompress.records.evaluation import Comparison


@click.command()
@click.argument("base")
@click.argument("models", nargs=-1, metavar="MODEL...")
@metric_options
@click.option("--runner", default="torch", show_default=True, metavar="NAME", help="The runtime that runs every MODEL.")
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Write report.html, report.md and report.json there.",
)
@track_option
@device_option
@json_option
def compare(
    base: str,
    models: tuple[str, ...],
    runner: str,
    output: Path | None,
    tracker: str | None,
    device: str,
    as_json: bool,
    **words: Any,
) -> None:
    """Compare each MODEL with BASE: one table with intervals, what got worse, and a plain verdict.

    Either all are models, or all are reports that `evaluate -o` wrote; then nothing is measured.

    \b
    Examples:
      llmcompress compare builtin:books-llama out/w4 out/w8 --suite quick -o comparison
      llmcompress compare report-w4 report-w8
    """
    quiet_libraries()
    from llmcompress.cli.evaluation_tables import comparison_tables
    from llmcompress.cli.terminal import TerminalProgress
    from llmcompress.report.folder import check_report_folder, is_report, write_report
    from llmcompress.report.tracking import check_tracker, track

    if output is not None:
        check_report_folder(output)
    if tracker is not None:
        check_tracker(tracker)
    saved = [is_report(Path(each)) for each in (base, *models)]
    if all(saved):
        found = _saved((base, *models), Words(**words))
    elif any(saved):
        raise CompressError(
            "compare.mixed",
            "some of these are models and some are saved reports",
            where=", ".join(each for each, it in zip((base, *models), saved, strict=True) if it),
            fix="give models alone, or reports alone",
            exit_code=ExitCode.USAGE,
        )
    else:
        if not models:
            raise click.UsageError("Name at least one MODEL to compare with BASE.")
        settings = settings_of(Words(**words))
        refuse_missing_models(base, *models)
        refuse_missing_texts(settings)
        with TerminalProgress() as progress:
            with loading_libraries(progress):
                from llmcompress.model_evaluation import compare as compare_models
            found = compare_models(base, models, settings, runner=runner, device=device, progress=progress)
    found = found.model_copy(update={"command": command_line()})
    if output is not None:
        write_report(found, output)
    if tracker is not None:
        for each in found.evaluations:
            track(each, tracker)
    print_json(found.model_dump(mode="json")) if as_json else print_tables(*comparison_tables(found))


def _saved(paths: tuple[str, ...], words: Words) -> Comparison:
    """What the reports hold, if they have the same dense model.

    Raises: CompressError when they have not.
    """
    from llmcompress.report.comparing import as_comparison
    from llmcompress.report.folder import read_measured

    if any(astuple(words)):
        raise click.UsageError("Saved reports are compared as they are: leave out what says what to measure.")
    return as_comparison([read_measured(Path(each)) for each in paths])
