"""`llmcompress evaluate`: perplexity of any model, dense or compressed."""

from __future__ import annotations

import click

from llmcompress.cli.early import refuse_missing_models, refuse_missing_texts
from llmcompress.cli.libraries import loading_libraries, quiet_libraries
from llmcompress.cli.output import device_option, json_option, print_json, print_tables


@click.command()
@click.argument("model")
@click.option(
    "--perplexity",
    "sources",
    metavar="SOURCE",
    multiple=True,
    default=("builtin:evaluation",),
    show_default=True,
    help="builtin:evaluation, a text file, or a dataset with its split (wikitext2:test). Repeatable.",
)
@click.option(
    "--window", type=click.IntRange(min=2), help="Tokens per window [default: the model's limit, at most 2048]."
)
@click.option(
    "--bos",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Whether every window starts with the BOS token.",
)
@click.option(
    "--runner",
    default="torch",
    show_default=True,
    metavar="NAME",
    help="Which runner runs the model [default: transformers].",
)
@click.option(
    "--max-windows",
    type=click.IntRange(min=1),
    help="Evaluate only this many windows [default: 16,384 tokens].",
)
@click.option("--whole-text", is_flag=True, help="Evaluate all windows.")
@device_option
@json_option
def evaluate(
    model: str,
    sources: tuple[str, ...],
    window: int | None,
    bos: str,
    max_windows: int | None,
    whole_text: bool,
    runner: str,
    device: str,
    as_json: bool,
) -> None:
    """Measure the perplexity of MODEL, dense or compressed.

    \b
    Examples:
      llmcompress evaluate builtin:books-llama
      llmcompress evaluate out --perplexity wikitext2:test --window 2048 --json
    """
    quiet_libraries()
    from llmcompress.cli.tables import perplexity_table
    from llmcompress.cli.terminal import TerminalProgress
    from llmcompress.evaluation.settings.perplexity import PerplexityTask

    if not all(sources):
        raise click.BadParameter("it is empty", param_hint="--perplexity")
    common = {"window": window, "bos": bos, "max_windows": "all" if whole_text else max_windows}
    tasks = [PerplexityTask.model_validate({**PerplexityTask.from_text(source), **common}) for source in sources]
    refuse_missing_models(model)
    refuse_missing_texts(tasks)
    with TerminalProgress() as progress:
        with loading_libraries(progress):
            from llmcompress import evaluate as evaluate_model
        found = evaluate_model(model, tasks, runner=runner, device=device, progress=progress)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        print_tables(perplexity_table(found.perplexities))
