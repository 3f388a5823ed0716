"""MoDeGPT against SliceGPT, tensor trains and Tucker against singular values, TensorGPT by rank, on one trained model.

    python evals/decomposition.py --name books-llama
    python evals/decomposition.py --model FOLDER --calibration train.txt --text test.txt --name NAME

Shares are of the parameters of all linears in the blocks, alike for all methods of a comparison; SliceGPT gives a tied
head a weight of its own on top, so the parameters of the whole model stand beside every number. Calibration and
measured text must differ; nothing is tuned on the measured text. Writes evals/results/decomposition-NAME.json.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from evals.trial import Setting, Trial, run_trial
from llmcompress.evaluation.environment import machine, versions
from llmcompress.model.skeleton import find_blocks

MODULAR = {
    "modegpt": "modegpt: {{fraction: {ratio}}}",
    "modegpt, uniform": "modegpt: {{fraction: {ratio}, allocation: uniform}}",
    "modegpt, plain": "modegpt: {{fraction: {ratio}, allocation: uniform, attention: false}}",
    "slicegpt": "slicegpt: {{fraction: {ratio}}}",
    "slicegpt, shortcuts": "slicegpt: {{fraction: {ratio}, form: shortcuts}}",
    "svd": "svd: {{fraction: {ratio}}}",
}
NETWORKS = {
    "svd of weights": 'svd: {{fraction: {ratio}, whitening: none, sites: "{sites}"}}',
    "svd, whitened": 'svd: {{fraction: {ratio}, sites: "{sites}"}}',
    "tensor train, 2 cores": 'tensor_train: {{fraction: {ratio}, sites: "{sites}"}}',
    "tensor train, 3 cores": 'tensor_train: {{fraction: {ratio}, ways: 3, sites: "{sites}"}}',
    "tucker": 'tucker: {{fraction: {ratio}, sites: "{sites}"}}',
}
HEADS = "*.self_attn.*"
"""Where Tucker has heads to work on, all methods work there and nowhere else."""


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True, help="measured text, held out")
@click.option("--name", required=True, help="of the result file")
@click.option("--ratio", "ratios", multiple=True, type=float, default=(0.1, 0.2, 0.25, 0.3), show_default=True)
@click.option("--samples", default=64, show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--window", default=512, show_default=True)
@click.option("--max-windows", default=60, show_default=True)
@click.option("--seeds", default=1, show_default=True, help="calibration draws of the first comparison")
def main(
    model: str,
    calibration: str,
    text: str,
    name: str,
    ratios: tuple[float, ...],
    samples: int,
    tokens: int,
    window: int,
    max_windows: int,
    seeds: int,
) -> None:
    """Measure every method at every share."""
    setting = Setting(model, calibration, text, samples, tokens, window, max_windows)
    dense = run_trial(setting)
    rows: list[dict[str, Any]] = []

    def measured(part: str, share: str, method: str, passes: str, draws: int = 1) -> None:
        trials = [run_trial(setting, f"- {passes}", seed=seed) for seed in range(draws)]
        found = [trial.perplexity.perplexity for trial in trials]
        row = {"part": part, "share": share, "method": method, "perplexity": found, **_sizes(trials[0])}
        if part == "embedding":
            row["lookup_microseconds"] = _lookup(trials[0].model.get_input_embeddings())
        rows.append(row)
        click.echo(f"{part} {share:8s} {method:26s} {statistics.mean(found):10.3f} {row['linears']:>10,}", err=True)

    for ratio in ratios:
        for method, passes in MODULAR.items():
            measured("modular", f"{ratio:.0%}", method, passes.format(ratio=ratio), seeds)
    for ratio in (0.1, 0.3):
        for method, passes in NETWORKS.items():
            measured("networks", f"{ratio:.0%}", method, passes.format(ratio=ratio, sites=HEADS))
    for ways in (2, 3):
        for rank in (1, 2, 4, 6, 8):
            options = f"rank: {rank}, ways: {ways}"
            measured("embedding", f"rank {rank}", f"{ways} axes", f"tensorgpt: {{{options}}}")
    facts = {
        "model": name,
        "calibration": Path(calibration).name,
        "samples": samples,
        "tokens": tokens,
        "dense": dense.perplexity.model_dump() | {"text": Path(text).name},
        **_sizes(dense),
        "lookup_microseconds": _lookup(dense.model.get_input_embeddings()),
        "rows": rows,
        "versions": versions(),
        "machine": machine(),
    }
    path = Path(__file__).parent / "results" / f"decomposition-{name}.json"
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(str(path))


def _sizes(trial: Trial) -> dict[str, int]:
    """Parameters of the whole model, of the blocks without norms, and of the embedding."""
    inside = (p for _, block in find_blocks(trial.model) for name, p in block.named_parameters() if "norm" not in name)
    embedding = trial.model.get_input_embeddings().parameters()
    return {
        "parameters": trial.parameters,
        "linears": sum(parameter.numel() for parameter in inside),
        "embedding": sum(parameter.numel() for parameter in embedding),
    }


@torch.no_grad()
def _lookup(embedding: nn.Module) -> dict[str, float]:
    """Median microseconds to look up one token, and 512."""
    return {str(count): _median_microseconds(lambda: embedding(torch.arange(count) % 500)) for count in (1, 512)}  # noqa: B023


def _median_microseconds(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return round(1e6 * statistics.median(seconds), 1)


if __name__ == "__main__":
    main()
