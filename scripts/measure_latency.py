"""Measures a latency table on this device, for a search that runs elsewhere; the weights of the model are not needed.

    python scripts/measure_latency.py MODEL SPACE --runtime onnxruntime --out table.json

MODEL is a folder with a config.json, a Hub id, or `builtin:books-llama`; SPACE is a search file, or a file with its
`space` alone. Copy the table back and name it in the search file: `costs: {table: table.json}`.
"""

from __future__ import annotations

from pathlib import Path

import click
from transformers import AutoConfig

from llmcompress.evaluation.device.speed import ClockName
from llmcompress.loading.source import find_source
from llmcompress.model.probe import probe
from llmcompress.plan_search.costs.measuring import measure_latency
from llmcompress.plan_search.costs.small_runs import LatencySettings
from llmcompress.plan_search.plan_space import PlanSpace
from llmcompress.plan_search.space import Space
from llmcompress.progress import Silent
from llmcompress.recipe.document import read_document


class Told(Silent):
    """Progress on standard error."""

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        """What is measured now."""
        click.echo(text, err=True)

    def note(self, text: str) -> None:
        """What the user should know."""
        click.echo(f"note: {text}", err=True)


@click.command()
@click.argument("model")
@click.argument("space", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--runtime", default="torch", help="torch, onnxruntime, onnxruntime_genai, openvino or llama_cpp.")
@click.option("--out", "output", default="latency.json", type=click.Path(path_type=Path), help="The table.")
@click.option("--batch", default=1, help="Sequences.")
@click.option("--context", default=128, help="Tokens of the prompt.")
@click.option("--turns", default=5, help="How often everything is measured; medians are taken.")
@click.option("--threads", type=int, help="Threads; left out: as many as PyTorch has.")
@click.option("--clock", type=click.Choice(["wall", "processor"]), default="wall", help="processor: on a busy machine.")
@click.option("--memory/--no-memory", default=True, help="Peak memory too: two more processes for every body.")
@click.option("--device", default="cpu", help="cpu, or cuda for the runtime torch.")
def main(
    model: str,
    space: Path,
    runtime: str,
    output: Path,
    batch: int,
    context: int,
    turns: int,
    threads: int | None,
    clock: ClockName,
    memory: bool,
    device: str,
) -> None:
    """Measure everything that a plan of SPACE for MODEL may have."""
    config = AutoConfig.from_pretrained(find_source(model).folder)
    found = read_document(space.read_text(encoding="utf-8"), str(space)).data
    plans = PlanSpace(Space.model_validate(found.get("space", found)), probe(config, unfuse=True))
    settings = LatencySettings(
        batch=batch, context=context, turns=turns, threads=threads, clock=clock, memory=memory, device=device
    )
    table = measure_latency(plans, config, runtime, settings=settings, progress=Told())
    table.write(output)
    click.echo(f"{len(table.products)} products, {len(table.blocks)} kinds of blocks: {output}")


if __name__ == "__main__":
    main()
