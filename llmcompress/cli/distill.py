"""`llmcompress distill`: a student learns from a teacher, and is saved as a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from llmcompress.cli.compress import interrupted
from llmcompress.cli.early import refuse_missing_models
from llmcompress.cli.libraries import loading_libraries, quiet_libraries
from llmcompress.cli.output import device_option, json_option, overwrite_option, print_json, print_tables
from llmcompress.errors import saved_of


@click.command()
@click.argument("teacher")
@click.argument("student")
@click.option(
    "--data", metavar="TEXT", default="builtin:calibration", show_default=True, help="Text: a file or a Hub dataset."
)
@click.option(
    "--examples",
    metavar="ROWS",
    help="A file or a Hub dataset with prompts and responses, or messages: the loss is on the answers.",
)
@click.option(
    "-o", "--output", metavar="DIR", type=click.Path(path_type=Path), required=True, help="The folder to write."
)
@click.option(
    "--objective", metavar="NAME", default="kl", show_default=True, help="What is learned (docs/training.md)."
)
@click.option("--on-policy", is_flag=True, help="The student writes the text after the beginning of every window.")
@click.option("--steps", type=click.IntRange(min=1), default=100, show_default=True, help="Optimizer steps.")
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change anything else, e.g. --set passes.distill.training.learning_rate=1e-4. Repeatable.",
)
@overwrite_option
@click.option("--fresh", is_flag=True, help="Start over instead of resuming an interrupted run.")
@device_option
@json_option
def distill(
    teacher: str,
    student: str,
    data: str,
    examples: str | None,
    output: Path,
    objective: str,
    on_policy: bool,
    steps: int,
    settings: tuple[str, ...],
    overwrite: bool,
    fresh: bool,
    device: str,
    as_json: bool,
) -> None:
    """Train STUDENT to predict what TEACHER predicts, and save it as a Hugging Face folder.

    Both are Hub ids, local folders or builtin:books-llama, with the same tokenizer (another one: --set
    passes.distill.vocabulary=matched). The same as a recipe for STUDENT
    with the pass `distill`; `llmcompress passes distill` lists its options.

    \b
    Examples:
      llmcompress distill Qwen/Qwen3-1.7B Qwen/Qwen3-0.6B --data my.txt --objective jsd --on-policy -o student
      llmcompress distill Qwen/Qwen3-1.7B Qwen/Qwen3-0.6B --examples answered.jsonl -o student
      llmcompress distill builtin:books-llama pruned -o healed --set passes.distill.rank=8
    """
    refuse_missing_models(teacher, student)
    quiet_libraries()
    from llmcompress.cli.tables import report_tables
    from llmcompress.cli.terminal import TerminalProgress

    options: dict[str, Any] = {"teacher": teacher, "objective": {objective: {}}, "training": {"steps": steps}}
    if on_policy:
        options["on_policy"] = {}
    document = {
        "model": student,
        "data": [{"read": {"source": examples}}] if examples else [],
        "calibration": {"source": data},
        "passes": [{"distill": options}],
    }
    with TerminalProgress() as progress:
        with loading_libraries(progress):
            from llmcompress import pipeline
            from llmcompress.recipe import parse_recipe
        recipe = parse_recipe(json.dumps(document), "the command line", settings=settings)
        try:
            done = pipeline.compress(
                student, recipe, output, device=device, overwrite=overwrite, fresh=fresh, progress=progress
            )
        except KeyboardInterrupt as interrupt:
            raise interrupted(output, saved_of(interrupt)) from None
    if as_json:
        print_json({"output": str(output), **done.report.model_dump(mode="json")})
    else:
        print_tables(*report_tables(done.report))
        click.echo(f"saved to {output}", err=True)
