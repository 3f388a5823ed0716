"""Distill a teacher into a student from Python; `llmcompress distill` does the same with progress and more options."""

from __future__ import annotations

import click

from llmcompress import compress


@click.command()
@click.argument("teacher")
@click.argument("student")
@click.argument("output")
@click.option("--data", default="builtin:calibration", help="Text: a file or a Hub dataset.")
@click.option("--examples", help="Rows with prompts and responses, or messages: a file or a Hub dataset.")
@click.option("--objective", default="kl", help="The name of an objective.")
@click.option("--steps", default=100, help="Optimizer steps.")
def main(teacher: str, student: str, output: str, data: str, examples: str | None, objective: str, steps: int) -> None:
    """Train STUDENT to predict what TEACHER predicts, and save it into the folder OUTPUT."""
    options = {"teacher": teacher, "objective": {objective: {}}, "training": {"steps": steps}}
    made = [{"read": {"source": examples}}] if examples else []
    recipe = {"data": made, "calibration": {"source": data}, "passes": [{"distill": options}]}
    for quality in compress(student, recipe, output).report.quality:
        before, after = quality.dense.perplexity, quality.compressed.perplexity
        print(f"{quality.dense.text}: perplexity {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main()
