"""Whether a teacher heals more than the text alone: one pruned student, every objective, the same text and steps.

    python evals/distillation.py --name books-llama
    python evals/distillation.py --name books-llama --only kl --only cross_entropy --seeds 3

The student is the model with 60 % of its weights removed by magnitude; it learns from its dense self. Measured on other
text, in windows of the same length that begin with BOS: perplexity, and both KL divergences to the dense model in nats
per token. Writes evals/results/distillation-NAME.json after every row.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.evaluation.environment import machine, versions
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.loading.teachers import TeacherFiles
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.recipe import parse_recipe

RESULTS = Path(__file__).resolve().parent / "results"
PRUNED = [{"magnitude": {"sparsity": 0.6}}]
ON_POLICY = {"prompt": 16, "tokens": 48}
ROWS: dict[str, dict[str, Any] | None] = {
    "pruned, not trained": None,
    "cross_entropy": {"recover": {}},
    "kl": {"distill": {"objective": {"kl": {}}}},
    "kl, half cross-entropy": {"distill": {"objective": {"kl": {"weight": 0.5}}}},
    "reverse kl": {"distill": {"objective": {"kl": {"direction": "reverse"}}}},
    "jsd": {"distill": {"objective": {"jsd": {}}}},
    "skew kl": {"distill": {"objective": {"skew_kl": {}}}},
    "total variation": {"distill": {"objective": {"total_variation": {}}}},
    "kl + hidden states": {"distill": {"objective": {"kl": {}, "hidden_states": {"layers": "uniform"}}}},
    "kl, stored: 32 top tokens": {"distill": {"objective": {"kl": {}}, "stored": {"form": "top", "tokens": 32}}},
    "kl, stored: 32 samples": {"distill": {"objective": {"kl": {}}, "stored": {"form": "sampled", "tokens": 32}}},
    "jsd, half on-policy": {"distill": {"objective": {"jsd": {}}, "on_policy": {**ON_POLICY, "fraction": 0.5}}},
    "minillm": {"distill": {"objective": {"minillm": {}}, "on_policy": ON_POLICY}},
}


def measured(model: PreTrainedModel, teacher: PreTrainedModel, windows_NT: Tensor) -> dict[str, float]:
    """On held-out windows, one at a time."""
    nats, forward, reverse = 0.0, 0.0, 0.0
    with torch.no_grad():
        for ids_1T in windows_NT.split(1):
            q, p = (each(input_ids=ids_1T).logits[0, :-1].log_softmax(-1) for each in (model, teacher))
            nats += float(functional.nll_loss(q, ids_1T[0, 1:]))
            forward += float((p.exp() * (p - q)).sum(-1).mean())
            reverse += float((q.exp() * (q - p)).sum(-1).mean())
    count = len(windows_NT)
    return {
        "perplexity": float(torch.tensor(nats / count).exp()),
        "forward_kl": forward / count,
        "reverse_kl": reverse / count,
    }


def trained(how: dict[str, Any] | None, source: str, context: RunContext, training: dict[str, Any]) -> PreTrainedModel:
    """The pruned student after that training."""
    passes = list(PRUNED)
    with tempfile.TemporaryDirectory() as folder:
        if how is not None:
            ((name, options),) = how.items()
            options = {**options, "training": training}
            if "stored" in options:
                options["stored"] = {**options["stored"], "folder": str(Path(folder) / "teacher")}
            passes.append({name: options})
        recipe = parse_recipe(json.dumps({"passes": passes}), "distillation.py")
        model = load_for_compression(find_source(source)).model
        return apply_passes(model, map_model(model), recipe.passes, context).model


@click.command()
@click.option("--model", "source", default="builtin:books-llama")
@click.option("--name", required=True)
@click.option("--text", default="builtin:calibration")
@click.option("--held-out", default="builtin:evaluation")
@click.option("--steps", default=60)
@click.option("--windows", default=48)
@click.option("--tokens", default=96)
@click.option("--seeds", default=1)
@click.option("--only", multiple=True)
def main(
    source: str,
    name: str,
    text: str,
    held_out: str,
    steps: int,
    windows: int,
    tokens: int,
    seeds: int,
    only: tuple[str, ...],
) -> None:
    """Measure every row."""
    loaded = load_for_compression(find_source(source))
    data = [
        calibration_windows(
            Calibration(source=each, samples=windows, tokens=tokens),
            loaded.tokenizer,
            max_positions=loaded.model.config.max_position_embeddings,
            seed=0,
        )
        for each in (text, held_out)
    ]
    training = {"steps": steps, "batch": 4, "learning_rate": 1e-3}
    rows: list[dict[str, Any]] = []
    for label, how in ROWS.items():
        if only and label not in only:
            continue
        for seed in range(seeds if how else 1):
            began = time.process_time()
            context = RunContext(data[0].windows_NT, seed=seed, teachers=TeacherFiles(source))
            model = trained(how, source, context, training)
            taken = time.process_time() - began
            rows.append(
                {"objective": label, "seed": seed, "cpu_seconds": round(taken, 1)}
                | measured(model, loaded.model, data[1].windows_NT)
            )
            click.echo(json.dumps(rows[-1]))
            settings = {"model": source, "text": text, "held_out": held_out, "windows": windows, "tokens": tokens}
            found = {"settings": {**settings, **training}, "machine": machine(), "versions": versions(), "rows": rows}
            (RESULTS / f"distillation-{name}.json").write_text(json.dumps(found, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
