"""`llmcompress compress`: the whole flow from a model to a folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmcompress.cli.early import refuse_mistakes
from llmcompress.cli.libraries import loading_libraries, quiet_libraries
from llmcompress.cli.output import (
    device_option,
    fail_by_gate,
    json_option,
    offload_option,
    overwrite_option,
    print_json,
    print_tables,
    track_option,
    yes_option,
)
from llmcompress.cli.push import as_data, push_command, tell, with_command
from llmcompress.errors import NOTHING_SAVED, CompressError, ExitCode, saved_of

if TYPE_CHECKING:
    from llmcompress.cost import Offload
    from llmcompress.recipe import Recipe


@click.command()
@click.argument("model", required=False)
@click.option("--preset", metavar="NAME", help="A recipe that comes with the package (see `llmcompress recipes ls`).")
@click.option(
    "--recipe", "recipe_file", metavar="FILE", type=click.Path(path_type=Path), help="Your recipe, a YAML file."
)
@click.option(
    "--from", "study", metavar="STUDY:TRIAL", help="The recipe of a trial that `search` found; STUDY: the selected one."
)
@click.option("-o", "--output", metavar="DIR", type=click.Path(path_type=Path), help="The folder to write.")
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change the recipe, e.g. --set calibration.samples=64 --set passes.gptq.scheme=int3_g32. Repeatable.",
)
@click.option(
    "--export",
    "targets",
    metavar="TARGET",
    multiple=True,
    help="Export the result too, into DIR-TARGET (see `llmcompress targets`). Repeatable.",
)
@click.option(
    "--publish",
    "repositories",
    metavar="USER/NAME",
    multiple=True,
    help="Push the result and its exports to this repository on the Hub, private where it is created. Repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Only show the plan: sites, bytes, memory and time. Reads no weights.")
@click.option(
    "--probe", is_flag=True, help="With --dry-run: compress a few blocks of each kind, unsaved, to estimate the time."
)
@overwrite_option
@click.option("--fresh", is_flag=True, help="Start over instead of resuming an interrupted run.")
@yes_option
@offload_option
@track_option
@device_option
@json_option
def compress(
    model: str | None,
    preset: str | None,
    recipe_file: Path | None,
    study: str | None,
    output: Path | None,
    settings: tuple[str, ...],
    targets: tuple[str, ...],
    repositories: tuple[str, ...],
    dry_run: bool,
    probe: bool,
    overwrite: bool,
    fresh: bool,
    yes: bool,
    offload: Offload,
    tracker: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Compress MODEL and save it as a Hugging Face folder.

    MODEL is a Hub id (also id@revision), a local folder or builtin:books-llama; it may be left out when the recipe
    names one.

    \b
    Examples:
      llmcompress compress builtin:books-llama --preset tiny/gptq -o out
      llmcompress compress Qwen/Qwen3-0.6B --preset w4 -o Qwen3-0.6B-w4 --dry-run
      llmcompress compress Qwen/Qwen3-0.6B --preset w4-heal --publish me/Qwen3-0.6B-w4 -o Qwen3-0.6B-w4
      llmcompress compress --recipe recipe.yaml -o out --set passes.gptq.scheme=int3_g64
      llmcompress compress --from study:17 -o out
    """
    if sum(given is not None for given in (preset, recipe_file, study)) != 1:
        raise click.UsageError("Give one of --preset NAME, --recipe FILE and --from STUDY:TRIAL, e.g. --preset w4.")
    if output is None and not dry_run:
        raise click.UsageError("Name the output folder with -o DIR, or preview with --dry-run.")
    if probe and not dry_run:
        raise click.UsageError("--probe belongs to --dry-run: a run itself needs no estimate.")
    quiet_libraries()
    from llmcompress.cli.tables import plan_tables, report_tables
    from llmcompress.cli.terminal import TerminalProgress
    from llmcompress.presets import preset_path

    if targets:
        settings = (*settings, f"export=[{', '.join(targets)}]")
    if repositories:
        settings = (*settings, f"publish={json.dumps({'hub': repositories})}")
    file = None if study is not None else recipe_file or preset_path(str(preset))
    if file is not None:
        # of several processes (torchrun) only the first may touch what lies at the output, and it is not known yet
        written = None if dry_run or "RANK" in os.environ else output
        refuse_mistakes(file, settings, model=model, output=written, overwrite=overwrite)
    if tracker is not None:
        from llmcompress.report.tracking import check_tracker

        check_tracker(tracker)
    with TerminalProgress() as progress:
        with loading_libraries(progress):
            from llmcompress import pipeline
            from llmcompress.hub_upload import NotPublished
            from llmcompress.recipe import read_recipe
        found = _from_study(str(study), settings) if file is None else read_recipe(file, settings=settings)
        recipe = found.for_model(model)
        assert recipe.model is not None
        with progress.paused():
            _confirm_remote_code(recipe, yes=yes)
        if dry_run:
            from llmcompress.calibration.devices import usable_device
            from llmcompress.cost import this_machine
            from llmcompress.publishing.rights import check_all_rights

            check_all_rights(recipe.publish)
            where = usable_device(device)
            foreseen = pipeline.plan(
                recipe.model,
                recipe,
                offload=offload,
                machine=this_machine(where),
                probe_on=where if probe else None,
                progress=progress,
            )
            plan = foreseen.model_dump(mode="json")
        else:
            assert output is not None
            try:
                done = pipeline.compress(
                    recipe.model,
                    recipe,
                    output,
                    device=device,
                    overwrite=overwrite,
                    fresh=fresh,
                    offload=offload,
                    progress=progress,
                )
            except KeyboardInterrupt as interrupt:
                raise interrupted(output, saved_of(interrupt)) from None
            except NotPublished as problem:
                raise with_command(problem, [push_command(*each) for each in problem.missing]) from problem.__cause__
    if dry_run:
        print_json(plan) if as_json else print_tables(*plan_tables(plan))
        return
    if tracker is not None:
        from llmcompress.report.tracking import track

        track(done.report, tracker, settings={"recipe": done.report.recipe_hash})
    if as_json:
        published = {"published": [as_data(each) for each in done.published]} if done.published else {}
        print_json({"output": str(output), **published, **done.report.model_dump(mode="json")})
    else:
        print_tables(*report_tables(done.report))
        click.echo(f"saved to {output}", err=True)
        for each in done.published:
            tell(each)
    fail_by_gate(done.report, as_json=as_json, saved=str(output))


def _from_study(study: str, settings: tuple[str, ...]) -> Recipe:
    """The recipe of a trial, with settings."""
    from llmcompress.plan_search.from_study import recipe_from_study
    from llmcompress.presets import as_recipe

    return as_recipe(recipe_from_study(study), settings=settings)


def _confirm_remote_code(recipe: Recipe, *, yes: bool) -> None:
    """Code of a model's repository runs only after a person said yes, here or with --yes."""
    if not recipe.trust_remote_code or yes:
        return
    where = f"{recipe.model}{f' at commit {recipe.revision}' if recipe.revision else ''}"
    if sys.stdin.isatty() and click.confirm(f"The recipe runs Python code from {where}. Run it?", err=True):
        return
    raise CompressError(
        "recipe.trust",
        f"the recipe wants to run Python code from {where}",
        fix="review the code, then add --yes",
        exit_code=ExitCode.USAGE,
    )


def interrupted(output: Path, saved: str | None) -> CompressError:
    """The error for Ctrl-C. `saved`: what the run said; None where it had not begun."""
    run = output.absolute().with_name(output.absolute().name + ".run")
    if saved is None and (run / "journal.jsonl").exists():
        saved = f"what an earlier run saved in {run}: run the same command again to resume"
    return CompressError(
        "interrupted",
        "interrupted before the run was complete",
        saved=saved or NOTHING_SAVED,
        exit_code=ExitCode.INTERRUPTED,
    )
