"""Measure the perplexity of models side by side; `llmcompress evaluate` measures one with more options."""

from __future__ import annotations

import click

from llmcompress import evaluate
from llmcompress.evaluation.settings.perplexity import PerplexityTask


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--text",
    "texts",
    multiple=True,
    default=("builtin:evaluation",),
    show_default=True,
    help="A text file, or a dataset with its split (wikitext2:test). Repeatable.",
)
def main(models: tuple[str, ...], texts: tuple[str, ...]) -> None:
    """Print one line per model and text."""
    tasks = [PerplexityTask.model_validate(PerplexityTask.from_text(text)) for text in texts]
    for model in models:
        for result in evaluate(model, tasks).perplexities:
            print(f"{model}  {result.text}  {result.perplexity:.3f}  ({result.tokens} tokens)")


if __name__ == "__main__":
    main()
