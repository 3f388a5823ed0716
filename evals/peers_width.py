"""FFN channels removed by us and by Torch-Pruning: the same model, calibration windows, text and number of parameters.

    python evals/peers_width.py --name books-llama

Needs `pip install torch-pruning` in the same environment. Heads are left alone: with shared key-value heads
Torch-Pruning 1.6 does not finish tracing which channels belong together (stopped after ten minutes on a model of two
layers); with as many key-value heads as queries it does. Writes evals/results/peers-width-NAME.json.
"""

from __future__ import annotations

import json
import statistics
from importlib.metadata import version
from pathlib import Path

import click
import torch
import torch_pruning
from torch import nn
from transformers import PreTrainedModel
from trial import Setting, run_trial

from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.footprint import parameters
from llmcompress.evaluation.perplexity import perplexity
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.progress import Silent

OURS = {
    "l2, no refit": "- width: {{fraction: {ratio}, heads: false, score: l2, refit: none}}",
    "taylor_first, no refit": "- width: {{fraction: {ratio}, heads: false, score: taylor_first, refit: none}}",
    "taylor_first": "- width: {{fraction: {ratio}, heads: false, score: taylor_first}}",
    "defaults": "- width: {{fraction: {ratio}, heads: false}}",
}
THEIRS = {
    "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
    "taylor": torch_pruning.importance.GroupTaylorImportance,
}
OUTSIDE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
"""Linears of a Llama block whose outputs stay as they are."""


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True)
@click.option("--name", required=True)
@click.option("--ratio", "ratios", multiple=True, type=float, default=(0.25, 0.5), show_default=True)
@click.option("--seeds", default=3, show_default=True)
def main(model: str, calibration: str, text: str, name: str, ratios: tuple[float, ...], seeds: int) -> None:
    """Run both and write what came out."""
    setting = Setting(model, calibration, text)
    dense = run_trial(setting)
    rows = []
    for ratio in ratios:
        for method, passes in OURS.items():
            trials = [run_trial(setting, passes.format(ratio=ratio), seed=seed) for seed in range(seeds)]
            results = [(trial.parameters, trial.perplexity.perplexity) for trial in trials]
            rows.append(row(ratio, f"llmcompress {method}", results))
        for method in THEIRS:
            rows.append(
                row(ratio, f"Torch-Pruning {method}", [theirs(setting, method, ratio, seed) for seed in range(seeds)])
            )
    facts = {
        "model": name,
        "dense": dense.perplexity.model_dump() | {"text": Path(text).name, "parameters": dense.parameters},
        "rows": rows,
        "versions": versions() | {"torch-pruning": version("torch-pruning")},
        "machine": machine(),
    }
    path = Path(__file__).parent / "results" / f"peers-width-{name}.json"
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(str(path))


def row(ratio: float, method: str, results: list[tuple[int, float]]) -> dict[str, object]:
    """One line of the result."""
    counts, found = [each[0] for each in results], [each[1] for each in results]
    click.echo(f"{ratio} {method:36s} {statistics.mean(counts):.0f} {statistics.mean(found):.3f} {found}", err=True)
    return {"ratio": ratio, "method": method, "parameters": counts, "perplexity": found}


def theirs(setting: Setting, method: str, ratio: float, seed: int) -> tuple[int, float]:
    """Parameters and perplexity of the peer."""
    loaded = load_for_compression(find_source(setting.model), dtype=torch.float32)
    settings = Calibration(source=str(setting.calibration), samples=setting.samples, tokens=setting.tokens)
    data = calibration_windows(settings, loaded.tokenizer, max_positions=setting.window, seed=seed, progress=Silent())
    pruned = peer(loaded.model, data.windows_NT, method, ratio)
    result = perplexity(pruned, loaded.tokenizer, setting.task, device=torch.device("cpu"), progress=Silent())
    return parameters(pruned), result.perplexity


def peer(model: PreTrainedModel, windows_NT: torch.Tensor, method: str, ratio: float) -> PreTrainedModel:
    """Torch-Pruning as its own example for language models uses it, with gradients over our calibration windows."""
    model.config.use_cache = False  # its tracer follows every output, and a cache is no tensor
    model.requires_grad_(True)
    fixed: list[nn.Module] = [model.get_output_embeddings()]
    fixed += [layer.get_submodule(name) for layer in model.model.layers for name in OUTSIDE]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs=windows_NT[:1, :7],
        importance=THEIRS[method](group_reduction="mean"),
        pruning_ratio=ratio,
        ignored_layers=fixed,
    )
    if method == "taylor":
        for ids_BT in torch.split(windows_NT, 8):
            model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    for group in pruner.step(interactive=True):
        group.prune()
    model.zero_grad(set_to_none=True)
    return model.requires_grad_(False).eval()


if __name__ == "__main__":
    main()
