"""rtn, gptq, awq and awq → gptq on one trained model, at several widths: perplexity on text none of them saw.

    python evals/quantization.py --model builtin:books-llama --name books-llama
    python evals/quantization.py --model FOLDER --calibration train.txt --text test.txt --name NAME

Calibration and measured text must differ; nothing is tuned on the measured text.
Writes evals/results/quantization-NAME.json.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import click
import torch

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.cli.terminal import TerminalProgress
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.perplexity import perplexity
from llmcompress.evaluation.settings.perplexity import PerplexityTask
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe

METHODS = {
    "rtn": "- rtn: {{scheme: {scheme}, on_indivisible: pad}}",
    "rtn, range mse": "- rtn: {{scheme: {scheme}, range: mse, on_indivisible: pad}}",
    "gptq": "- gptq: {{scheme: {scheme}, on_indivisible: pad}}",
    "awq": "- awq: {{scheme: {scheme}, on_indivisible: pad}}",
    "awq→gptq": "- awq: {{scheme: {scheme}, round: false, on_indivisible: pad}}\n"
    "- gptq: {{scheme: {scheme}, on_indivisible: pad}}",
}


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True, help="measured text, held out")
@click.option("--name", required=True, help="of the result file and the table row")
@click.option("--bits", multiple=True, type=int, default=(4, 3), show_default=True)
@click.option("--group", default=32, show_default=True)
@click.option("--samples", default=64, show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--window", default=512, show_default=True)
@click.option("--max-windows", default=200, show_default=True)
@click.option("--seeds", default=3, show_default=True, help="calibration draws; the table shows mean and range")
def main(
    model: str,
    calibration: str,
    text: str,
    name: str,
    bits: tuple[int, ...],
    group: int,
    samples: int,
    tokens: int,
    window: int,
    max_windows: int,
    seeds: int,
) -> None:
    """Measure every method at every width."""
    task = PerplexityTask(source=text, window=window, bos="always", max_windows=max_windows)
    source = find_source(model)
    device = torch.device("cpu")
    loaded = load_for_compression(source, dtype=torch.float32)
    dense = perplexity(loaded.model, loaded.tokenizer, task, device=device, progress=Silent())
    rows = []
    with TerminalProgress() as progress:
        for width in bits:
            for grid in ("", "_asym"):
                scheme = f"int{width}_g{group}{grid}"
                for method, passes in METHODS.items():
                    found = []
                    for seed in range(1 if method.startswith("rtn") else seeds):
                        recipe = parse_recipe("passes:\n" + passes.format(scheme=scheme), "evals")
                        trial = load_for_compression(source, dtype=torch.float32)
                        settings = Calibration(source=calibration, samples=samples, tokens=tokens)
                        data = calibration_windows(
                            settings, trial.tokenizer, max_positions=window, seed=seed, progress=Silent()
                        )
                        progress.stage(f"{method} {scheme} seed {seed}", 1)
                        apply_passes(
                            trial.model,
                            map_model(trial.model),
                            recipe.passes,
                            RunContext(
                                data.windows_NT, batch=8, device=device, storage_dtype=trial.preflight.storage_dtype
                            ),
                        )
                        result = perplexity(trial.model, trial.tokenizer, task, device=device, progress=Silent())
                        found.append(result.perplexity)
                        progress.step(f"{result.perplexity:.3f}")
                    rows.append({"scheme": scheme, "method": method, "perplexity": found})
                    click.echo(f"{scheme:16s} {method:10s} {statistics.mean(found):.3f} {found}", err=True)
    facts = {
        "model": name,
        "calibration": Path(calibration).name,
        "samples": samples,
        "windows": len(data.windows_NT),
        "tokens": tokens,
        "dense": dense.model_dump() | {"text": Path(text).name},
        "rows": rows,
        "versions": versions(),
        "machine": machine(),
    }
    path = Path(__file__).parent / "results" / f"quantization-{name}.json"
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(str(path))


if __name__ == "__main__":
    main()
