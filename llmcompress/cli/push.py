"""`llmcompress push`: a finished folder to a repository on the Hub."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmcompress.cli.libraries import loading_libraries, quiet_libraries
from llmcompress.cli.output import json_option, print_json, print_tables
from llmcompress.errors import CompressError, ExitCode

if TYPE_CHECKING:
    from llmcompress.publishing.commits import Pushed
    from llmcompress.publishing.destinations import HubRepository


@click.command(short_help="Publish a finished folder on the Hugging Face Hub, with a model card.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repository", metavar="USER/NAME")
@click.option("--private/--public", default=None, help="Who can see it [default: private, or as it is].")
@click.option("--revision", metavar="BRANCH", help="Push to this branch, created if necessary [default: main].")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead.")
@click.option("--message", metavar="TEXT", help="Message of the commit.")
@click.option("--tag", metavar="TAG", help="Tag the commit, e.g. v1.0.")
@click.option(
    "--also",
    metavar="DIR",
    multiple=True,
    type=click.Path(path_type=Path),
    help="An export of the same model for the same repository: GGUF at its root, others in a folder. Repeatable.",
)
@click.option(
    "--report", metavar="DIR", type=click.Path(path_type=Path), help="What `evaluate` wrote, for the model card."
)
@click.option("--base-model", metavar="ID", help="The dense model on the Hub, if it was read from a local folder.")
@click.option("--dry-run", is_flag=True, help="Check everything and show files and card; nothing is sent.")
@json_option
def push(
    folder: Path,
    repository: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    message: str | None,
    tag: str | None,
    also: tuple[Path, ...],
    report: Path | None,
    base_model: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Publish FOLDER, which `compress`, `distill` or `export` wrote, as the repository USER/NAME.

    The login is that of `hf auth login` or HF_TOKEN. The folder is verified and searched for secrets before anything is
    sent; files that llmcompress did not write stay here. The same again makes no commit; after an interruption the
    same command sends what is missing.

    \b
    Examples:
      llmcompress push Qwen3-0.6B-w4 me/Qwen3-0.6B-w4 --dry-run
      llmcompress push Qwen3-0.6B-w4 me/Qwen3-0.6B-w4 --also Qwen3-0.6B-gguf --tag v1.0
    """
    quiet_libraries()
    from llmcompress.cli.terminal import TerminalProgress
    from llmcompress.publishing.destinations import hub_repository

    given = {"private": private, "revision": revision, "message": message, "tag": tag, "base_model": base_model}
    settings = {name: value for name, value in given.items() if value is not None}
    wanted = hub_repository(repository, create_pr=create_pr, **settings)
    folders = [folder, *also]
    with TerminalProgress() as progress:
        with loading_libraries(progress):
            from llmcompress import hub_upload
        if dry_run:
            outgoing = hub_upload.preview(folders, wanted, report=report)
        else:
            try:
                done = hub_upload.push(folders, wanted, report=report, progress=progress)
            except CompressError as problem:
                raise with_command(problem, [push_command(folders, wanted, report=report)]) from problem.__cause__
    if dry_run:
        from llmcompress.cli.push_tables import outgoing_table

        shown = {"files": {each.name: each.size for each in outgoing.files}, "left_out": list(outgoing.left_out)}
        if as_json:
            print_json({**shown, "card": outgoing.card})
        else:
            print_tables(outgoing_table(outgoing))
            click.echo(outgoing.card)
        return
    print_json(as_data(done)) if as_json else tell(done)


def tell(done: Pushed) -> None:
    """What was published, for people; on stderr like everything that is no result."""
    if not done.changed and not done.removed:
        click.echo(f"already up to date: {done.url} holds exactly this at {str(done.commit)[:12]}", err=True)
        return
    removed = f", {len(done.removed)} of an earlier upload removed" if done.removed else ""
    where = done.pull_request or f"{done.url}, commit {str(done.commit)[:12]}"
    click.echo(f"published {len(done.changed)} files{removed}: {where}", err=True)


def as_data(done: Pushed) -> dict[str, object]:
    """The same for `--json`."""
    return {
        "url": done.url,
        "commit": done.commit,
        "changed": list(done.changed),
        "removed": list(done.removed),
        "pull_request": done.pull_request,
        "up_to_date": not done.changed and not done.removed,
    }


def push_command(folders: Sequence[Path], wanted: HubRepository, *, report: Path | None = None) -> str:
    """What to type to push this, or to push it again."""
    words = ["llmcompress", "push", str(folders[0]), wanted.repository]
    if wanted.private is not None:
        words.append("--private" if wanted.private else "--public")
    if wanted.create_pr:
        words.append("--create-pr")
    message = wanted.message if wanted.message != type(wanted).model_fields["message"].default else None
    for flag, value in (
        ("--revision", wanted.revision),
        ("--message", message),
        ("--tag", wanted.tag),
        ("--base-model", wanted.base_model),
        ("--report", None if report is None else str(report)),
        *(("--also", str(each)) for each in folders[1:]),
    ):
        if value is not None:
            words += [flag, value]
    return shlex.join(words)


def with_command(problem: CompressError, commands: Sequence[str]) -> CompressError:
    """The same error of the Hub with the exact lines to type next; others need another remedy first."""
    if problem.exit_code is ExitCode.HUB:
        problem.fix = f"{problem.fix}; then run: {' && '.join(commands)}"
    return problem
