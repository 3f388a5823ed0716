"""Compress a model from Python; `llmcompress compress` does the same with progress and more options."""

from __future__ import annotations

import click

from llmcompress import compress


@click.command()
@click.argument("model")
@click.argument("recipe")
@click.argument("output")
def main(model: str, recipe: str, output: str) -> None:
    """Compress MODEL (Hub id, folder, builtin:books-llama) by RECIPE (preset or file) into the folder OUTPUT."""
    report = compress(model, recipe, output).report
    for quality in report.quality:
        dense, compressed = quality.dense.perplexity, quality.compressed.perplexity
        print(f"{quality.dense.text}: perplexity {dense:.3f} -> {compressed:.3f}")
    print(f"weight files: {report.bytes_dense} -> {report.bytes_compressed} bytes")


if __name__ == "__main__":
    main()
