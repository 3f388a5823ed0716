"""Which blocks to remove from one trained model: every score and mode, at several depths, on text none of them saw.

    python evals/depth.py --name books-llama
    python evals/depth.py --model FOLDER --calibration train.txt --text test.txt --name NAME

Calibration and measured text must differ; nothing is tuned on the measured text. `every choice` removes each possible
set of blocks in turn: how good the best choice would have been, and how bad a random one is on average.
Writes evals/results/depth-NAME.json.
"""

from __future__ import annotations

import copy
import json
import statistics
from itertools import combinations
from pathlib import Path

import click
import torch
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.footprint import parameters
from llmcompress.evaluation.perplexity import perplexity
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.model.depth import drop_blocks
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe

METHODS = {
    "block influence": "- depth: {{count: {count}}}",
    "block influence, without the first token": "- depth: {{count: {count}, skip_first_token: true}}",
    "block influence, greedy": "- depth: {{count: {count}, mode: greedy}}",
    "perplexity": "- depth: {{count: {count}, score: perplexity}}",
    "perplexity, greedy": "- depth: {{count: {count}, score: perplexity, mode: greedy}}",
    "contiguous, angle": "- depth: {{count: {count}, mode: contiguous}}",
    "contiguous, perplexity": "- depth: {{count: {count}, score: perplexity, mode: contiguous}}",
}


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True, help="measured text, held out")
@click.option("--name", required=True, help="of the result file and the table row")
@click.option("--remove", multiple=True, type=int, default=(1, 2, 3), show_default=True, help="blocks")
@click.option("--samples", default=64, show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--window", default=512, show_default=True)
@click.option("--max-windows", default=60, show_default=True)
@click.option("--seeds", default=3, show_default=True, help="calibration draws; the table shows mean and range")
def main(
    model: str,
    calibration: str,
    text: str,
    name: str,
    remove: tuple[int, ...],
    samples: int,
    tokens: int,
    window: int,
    max_windows: int,
    seeds: int,
) -> None:
    """Measure every method at every depth."""
    task = PerplexityTask(source=text, window=window, bos="always", max_windows=max_windows)
    loaded = load_for_compression(find_source(model), dtype=torch.float32)
    model_map = map_model(loaded.model)
    settings = Calibration(source=calibration, samples=samples, tokens=tokens)
    draws = [
        calibration_windows(settings, loaded.tokenizer, max_positions=window, seed=seed, progress=Silent()).windows_NT
        for seed in range(seeds)
    ]

    def measured(tried: PreTrainedModel) -> float:
        return perplexity(tried, loaded.tokenizer, task, device=torch.device("cpu"), progress=Silent()).perplexity

    def compressed(passes: str, seed: int) -> tuple[PreTrainedModel, list[int]]:
        tried, rows = apply_passes(
            copy.deepcopy(loaded.model),
            model_map,
            parse_recipe("passes:\n" + passes, "evals").passes,
            RunContext(draws[seed], batch=8, storage_dtype=loaded.preflight.storage_dtype, seed=seed),
        )
        return tried, sorted(int(row.site.rpartition(".")[2]) for row in rows)

    dense = perplexity(loaded.model, loaded.tokenizer, task, device=torch.device("cpu"), progress=Silent())
    rows: list[dict[str, object]] = []
    for count in remove:
        known: dict[tuple[int, ...], float] = {}
        size = 0
        for gone in combinations(range(len(model_map.blocks)), count):
            tried = copy.deepcopy(loaded.model)
            drop_blocks(tried, gone)
            known[gone], size = measured(tried), parameters(tried)
        every = sorted(known.values())
        choices = {" ".join(map(str, gone)): value for gone, value in known.items()}
        rows.append({"remove": count, "method": "every choice", "perplexity": every, "choices": choices})
        click.echo(f"{count} every choice: best {every[0]:.3f}, mean {statistics.mean(every):.3f}", err=True)
        for method, passes in METHODS.items():
            found, gone_sets = [], []
            for seed in range(seeds):
                _, gone_list = compressed(passes.format(count=count), seed)
                found.append(known[tuple(gone_list)])
                gone_sets.append(gone_list)
            rank = [every.index(value) + 1 for value in found]
            rows.append(
                {
                    "remove": count,
                    "method": method,
                    "perplexity": found,
                    "blocks": gone_sets,
                    "place among all choices": rank,
                    "parameters": size,
                }
            )
            click.echo(f"{count} {method:42s} {statistics.mean(found):9.3f} {gone_sets} {rank}/{len(every)}", err=True)
    facts = {
        "model": name,
        "calibration": Path(calibration).name,
        "samples": samples,
        "windows": len(draws[0]),
        "tokens": tokens,
        "blocks": len(model_map.blocks),
        "dense": dense.model_dump() | {"text": Path(text).name},
        "dense parameters": parameters(loaded.model),
        "rows": rows,
        "versions": versions(),
        "machine": machine(),
    }
    path = Path(__file__).parent / "results" / f"depth-{name}.json"
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(str(path))


if __name__ == "__main__":
    main()
