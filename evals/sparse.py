"""Magnitude, wanda and sparsegpt on one trained model, at several sparsities: perplexity on text none of them saw.

    python evals/sparse.py --name books-llama
    python evals/sparse.py --model FOLDER --calibration train.txt --text test.txt --name NAME

Also: rounding after pruning against rounding in the same sweep, and one budget for all blocks against the same share
everywhere. Calibration and measured text must differ; nothing is tuned on the measured text.
Writes evals/results/sparse-NAME.json.
"""

from __future__ import annotations

import copy
import json
import statistics
from pathlib import Path

import click
import torch
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.errors import CompressError
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.perplexity import perplexity
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe

SHARES = {"50 %": "sparsity: 0.5", "60 %": "sparsity: 0.6", "2:4": 'pattern: "2:4"', "4:8": 'pattern: "4:8"'}
MASKS = {
    "magnitude": "- magnitude: {{{share}}}",
    "wanda": "- wanda: {{{share}}}",
    "wanda, per layer": "- wanda: {{{share}, comparison: layer}}",
    "sparsegpt": "- sparsegpt: {{{share}}}",
}
BUDGETS = {
    "magnitude": "- magnitude: {{{share}}}",
    "magnitude, global": "- magnitude: {{{share}, comparison: global}}",
    "wanda": "- wanda: {{{share}}}",
    "wanda, outliers": "- wanda: {{{share}, allocation: outliers}}",
    "wanda, loss": "- wanda: {{{share}, allocation: loss}}",
    "sparsegpt": "- sparsegpt: {{{share}}}",
    "sparsegpt, outliers": "- sparsegpt: {{{share}, allocation: outliers}}",
    "sparsegpt, loss": "- sparsegpt: {{{share}, allocation: loss}}",
}
ROUNDED = {
    "gptq alone": "- gptq: {{scheme: int4_g32, on_indivisible: pad}}",
    "magnitude→gptq": "- magnitude: {{{share}}}\n- gptq: {{scheme: int4_g32, on_indivisible: pad}}",
    "sparsegpt→gptq": "- sparsegpt: {{{share}}}\n- gptq: {{scheme: int4_g32, on_indivisible: pad}}",
    "sparsegpt, joint": "- sparsegpt: {{{share}, scheme: int4_g32, on_indivisible: pad}}",
}
TABLES = {
    "masks": (SHARES, MASKS),
    "budgets": ({"60 %": "sparsity: 0.6", "70 %": "sparsity: 0.7"}, BUDGETS),
    "rounded": ({"50 %": "sparsity: 0.5", "2:4": 'pattern: "2:4"'}, ROUNDED),
}
NO_DATA = ("magnitude", "magnitude, global")


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True, help="measured text, held out")
@click.option("--name", required=True, help="of the result file and the table row")
@click.option(
    "--table", "chosen", multiple=True, type=click.Choice(list(TABLES)), default=tuple(TABLES), show_default=True
)
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
    chosen: tuple[str, ...],
    samples: int,
    tokens: int,
    window: int,
    max_windows: int,
    seeds: int,
) -> None:
    """Measure every method at every sparsity; a table that is not asked for keeps the rows that the file has."""
    path = Path(__file__).parent / "results" / f"sparse-{name}.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    task = PerplexityTask(source=text, window=window, bos="always", max_windows=max_windows)
    loaded = load_for_compression(find_source(model), dtype=torch.float32)
    storage_dtype, tokenizer = loaded.preflight.storage_dtype, loaded.tokenizer
    model_map = map_model(loaded.model)
    settings = Calibration(source=calibration, samples=samples, tokens=tokens)
    draws = [
        calibration_windows(settings, tokenizer, max_positions=window, seed=seed, progress=Silent()).windows_NT
        for seed in range(seeds)
    ]

    def measured(tried: PreTrainedModel) -> float:
        found = perplexity(tried, tokenizer, task, device=torch.device("cpu"), progress=Silent())
        return found.perplexity

    def compressed(passes: str, seed: int) -> tuple[float, float]:
        """Perplexity, and the share of zeros in all sites."""
        tried, _ = apply_passes(
            copy.deepcopy(loaded.model),
            model_map,
            parse_recipe("passes:\n" + passes, "evals").passes,
            RunContext(draws[seed], batch=8, storage_dtype=storage_dtype),
        )
        weights = [tried.get_submodule(site).weight for site in model_map.site_names()]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        return measured(tried), zeros / sum(weight.numel() for weight in weights)

    dense = perplexity(loaded.model, tokenizer, task, device=torch.device("cpu"), progress=Silent())
    rows: list[dict[str, object]] = [row for row in before if row["table"] not in chosen]
    known: dict[str, list[tuple[float, float]]] = {}
    for table in chosen:
        shares, methods = TABLES[table]
        for label, share in shares.items():
            if not fits(share, model_map):
                continue
            for method, template in methods.items():
                passes = template.format(share=share)
                if "pattern" in passes and "comparison" in passes:
                    continue  # a pattern compares inside its groups
                if passes not in known:
                    count = 1 if method in NO_DATA else seeds
                    known[passes] = [compressed(passes, seed) for seed in range(count)]
                found = [each for each, _ in known[passes]]
                zeros = known[passes][0][1]
                rows.append({"table": table, "share": label, "method": method, "perplexity": found, "zeros": zeros})
                click.echo(
                    f"{table:8s} {label:5s} {method:20s} {statistics.mean(found):9.3f} {found} {zeros:.6f}", err=True
                )
    facts = {
        "model": name,
        "calibration": Path(calibration).name,
        "samples": samples,
        "windows": len(draws[0]),
        "tokens": tokens,
        "dense": dense.model_dump() | {"text": Path(text).name},
        "rows": rows,
        "versions": versions(),
        "machine": machine(),
    }
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(str(path))


def fits(share: str, model_map: ModelMap) -> bool:
    """Whether the widths of all sites divide into groups of the pattern."""
    (each,) = parse_recipe(f"passes: [magnitude: {{{share}}}]", "evals").passes
    try:
        each.check(model_map)
    except CompressError:
        return False
    return True


if __name__ == "__main__":
    main()
