"""`llmcompress search`: the best recipe within limits on bytes, speed or energy, by one process or many."""

from __future__ import annotations

from pathlib import Path

import click

from llmcompress.cli.early import refuse_missing_models
from llmcompress.cli.libraries import loading_libraries, quiet_libraries
from llmcompress.cli.output import device_option, json_option, print_json, print_tables
from llmcompress.errors import CompressError, ExitCode


@click.command(short_help="Search the best recipe within limits on bytes, speed or energy.")
@click.argument("model", required=False)
@click.option(
    "--space", metavar="FILE", help="A search file, or the name of one that comes with the package, such as joint."
)
@click.option("-o", "--output", metavar="DIR", type=click.Path(path_type=Path), help="The folder of the study.")
@click.option("--fit", metavar="BYTES", help="The most that the weight files may take: 4GB, or 0.25x of dense.")
@click.option("--latency", metavar="TIME", help="The most that a generated token may take: 50ms/token, 20tokens/s.")
@click.option("--memory", metavar="BYTES", help="The most memory that the model may take: 6GB.")
@click.option("--energy", metavar="JOULES", help="The most that a generated token may take: 0.4J/token.")
@click.option(
    "--set", "settings", metavar="KEY=VALUE", multiple=True, help="Change one value of the search file. Repeatable."
)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Processes that judge plans, one GPU each; 0: this one does.",
)
@click.option(
    "--database",
    metavar="URL",
    help="Keep the study in PostgreSQL (postgresql+psycopg://…), for many hosts.",
)
@click.option("--study", metavar="NAME", default="llmcompress", show_default=True, help="Its name in that database.")
@click.option(
    "--join",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Be one more worker of the study in DIR, or with --database of that one; DIR then holds this host's levels.",
)
@device_option
@json_option
def search(
    model: str | None,
    space: str | None,
    output: Path | None,
    fit: str | None,
    latency: str | None,
    memory: str | None,
    energy: str | None,
    settings: tuple[str, ...],
    workers: int,
    database: str | None,
    study: str,
    join: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Search how to compress each part of MODEL, so that it loses least within the limits.

    Writes the study into DIR: every trial (study.db, for optuna-dashboard), the front (front.json), a report, one
    recipe for every plan of the front, and the best plan compressed by it. The same command goes on after an
    interruption.

    \b
    Examples:
      llmcompress search builtin:books-llama --space joint --fit 1.5MB -o study
      llmcompress search Qwen/Qwen3-0.6B --space space.yaml --fit 0.25x --latency 20ms/token -o study --workers 4
      llmcompress search --join study
    """
    if join is None and (space is None or output is None):
        raise click.UsageError("Name a search file with --space FILE and a folder with -o DIR, or join a study.")
    quiet_libraries()
    from llmcompress.cli.terminal import TerminalProgress

    if model is not None:
        refuse_missing_models(model)
    with TerminalProgress() as progress:
        with loading_libraries(progress):
            from llmcompress.plan_search import searching
            from llmcompress.plan_search.joining import join as join_study
            from llmcompress.plan_search.settings import read_search
        if join is not None:
            done = join_study(join, device=device, database=database, name=study, progress=progress)
            click.echo(f"judged {done} plans", err=True)
            return
        assert space is not None and output is not None
        given = {"bytes": fit, "decode": latency, "memory": memory, "energy": energy}
        limits = {axis: text for axis, text in given.items() if text is not None}
        try:
            found = searching.search(
                model,
                read_search(space, settings=settings),
                output,
                limits=limits,
                workers=searching.Workers(workers, database, study),
                device=device,
                progress=progress,
            )
        except KeyboardInterrupt:
            raise interrupted(output) from None
    if as_json:
        print_json(found.model_dump(mode="json", exclude={"trials", "kept"}))
        return
    from llmcompress.cli.search_tables import search_tables

    print_tables(*search_tables(found))
    click.echo(f"saved to {output}; the report is {output / 'report' / 'report.html'}", err=True)


def interrupted(output: Path) -> CompressError:
    """The error for Ctrl-C."""
    return CompressError(
        "interrupted",
        "interrupted before the search was over",
        saved=f"all outcomes and levels so far, in {output}: run the same command again to resume",
        exit_code=ExitCode.INTERRUPTED,
    )
