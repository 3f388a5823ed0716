"""`llmcompress evaluate`: everything that is measured of a model, alone or beside its dense model."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmcompress.cli.early import refuse_missing_models, refuse_missing_texts
from llmcompress.cli.libraries import loading_libraries, quiet_libraries
from llmcompress.cli.metrics import Words, metric_options, settings_of
from llmcompress.cli.output import (
    device_option,
    fail_by_gate,
    json_option,
    print_json,
    print_tables,
    track_option,
)
from llmcompress.errors import CompressError

if TYPE_CHECKING:
    from llmcompress.records.evaluation import Evaluation


@click.command()
@click.argument("model")
@click.option("--baseline", metavar="BASE", help="The dense model: what compression changed, item by item.")
@metric_options
@click.option(
    "--runner", default="torch", show_default=True, metavar="NAME", help="The runtime that runs MODEL; torch runs BASE."
)
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Write report.html, report.md and report.json there.",
)
@click.option(
    "--write-kl-base",
    "kl_base",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Only write MODEL's log-probabilities on one text to FILE, as llama-perplexity --kl-divergence-base does. "
    "Such a file is a SOURCE of --perplexity, with its dense model in it.",
)
@track_option
@device_option
@json_option
def evaluate(
    model: str,
    baseline: str | None,
    runner: str,
    output: Path | None,
    kl_base: Path | None,
    tracker: str | None,
    device: str,
    as_json: bool,
    **words: Any,
) -> None:
    """Measure MODEL, dense or compressed, in any runtime; with --baseline also what it lost.

    Everything observed of a model is kept: after an interruption or an error the same command goes on.

    \b
    Examples:
      llmcompress evaluate builtin:books-llama
      llmcompress evaluate out --baseline builtin:books-llama --suite quick -o report
      llmcompress evaluate out --perplexity wikitext2:test --window 2048 --json
      llmcompress evaluate builtin:books-llama --write-kl-base dense.kld
    """
    quiet_libraries()
    if kl_base is not None:
        _write_kl_base(model, kl_base, Words(**words), runner=runner, device=device)
        return
    from llmcompress.cli.evaluation_tables import evaluation_tables
    from llmcompress.cli.terminal import TerminalProgress

    settings = settings_of(Words(**words))
    refuse_missing_models(*([model, baseline] if baseline else [model]))
    refuse_missing_texts(settings)
    _check_places(settings, baseline, output, tracker)
    with TerminalProgress() as progress:
        with loading_libraries(progress):
            from llmcompress.model_evaluation import evaluations
        found: Evaluation | None = None
        try:
            for so_far in evaluations(
                model, settings, baseline=baseline, runner=runner, device=device, progress=progress
            ):
                found = so_far
        except BaseException as failure:
            _tell_unfinished(found, failure, output)
            raise
    assert found is not None
    found = _written(found, output)
    if tracker is not None:
        from llmcompress.report.tracking import track

        track(found, tracker)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_tables(*evaluation_tables(found))
        if output is not None:
            click.echo(f"report written to {output}", err=True)
    fail_by_gate(found, as_json=as_json, saved=str(output) if output else "what was measured")


def _write_kl_base(model: str, file: Path, words: Words, *, runner: str, device: str) -> None:
    """By the protocol `llama-cpp`, unless another one is named; a text is needed, and is the bundled one by default."""
    from llmcompress.cli.terminal import TerminalProgress
    from llmcompress.evaluation.settings.perplexity import BUNDLED_TEXT, PerplexityTask

    named = replace(words, protocol=words.protocol or "llama-cpp", sources=words.sources or (BUNDLED_TEXT[0].source,))
    texts = [each for each in settings_of(named) if isinstance(each, PerplexityTask)]
    if len(texts) != 1:
        raise click.UsageError("--write-kl-base writes one text: name one with --perplexity.")
    refuse_missing_models(model)
    refuse_missing_texts(texts)
    with TerminalProgress() as progress:
        with loading_libraries(progress):
            from llmcompress.model_evaluation import write_kl_base
        write_kl_base(model, file, texts[0], runner=runner, device=device, progress=progress)
    click.echo(f"log-probabilities written to {file}", err=True)


def _check_places(settings: Any, baseline: str | None, output: Path | None, tracker: str | None) -> None:
    """What would only fail after the work."""
    from llmcompress.evaluation.gate import check_gate

    check_gate(settings, compares=baseline is not None)
    if output is not None:
        from llmcompress.report.folder import check_report_folder

        check_report_folder(output)
    if tracker is not None:
        from llmcompress.report.tracking import check_tracker

        check_tracker(tracker)


def _written(found: Evaluation, output: Path | None) -> Evaluation:
    """With the command that made it, and in the folder if there is one."""
    found = found.model_copy(update={"command": command_line()})
    if output is not None:
        from llmcompress.report.folder import write_report

        write_report(found, output)
    return found


def _tell_unfinished(found: Evaluation | None, failure: BaseException, output: Path | None) -> None:
    """What was finished before an error, in the folder if there is one, otherwise on the screen of a person."""
    if found is None or output is None:
        return
    _written(found, output)
    if isinstance(failure, CompressError):
        failure.saved = f"what was finished, in {output}: the same command goes on after it"
    else:
        from llmcompress.errors import note_saved

        note_saved(failure, f"what was finished, in {output}: the same command goes on after it")


def command_line() -> str:
    """What was typed, as it can be typed again."""
    return shlex.join(["llmcompress", *sys.argv[1:]])
