"""What our sparsegpt and wanda cost, and llm-compressor's, in plain forward passes over the same calibration tokens.

    OMP_NUM_THREADS=1 python evals/peers/sparse_seconds.py --environments FOLDER

A Llama of 110 M random weights, 8 × 512 tokens, float32. Everything is CPU seconds of one thread, divided by the CPU
seconds of plain forward passes (no gradient, logits included) right before and after in the same process, because the
speed of a shared machine drifts. Loading and, for ours, mapping the model are left out and given apart.
Writes evals/results/peers-sparse-seconds.json.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import click
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from venvs import run_in

from llmcompress.evaluation.environment import machine, versions
from llmcompress.loading.source import find_source
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES
from llmcompress.progress import Silent

METHODS = ("wanda", "sparsegpt")
SHARES = {"50 %": ({"sparsity": 0.5}, "0:0"), "2:4": ({"pattern": "2:4"}, "2:4")}


@click.command()
@click.option("--environments", type=Path, help="where peers' environments are kept; without it only ours is measured")
@click.option("--samples", default=8, show_default=True)
@click.option("--tokens", default=512, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--layers", default=12, show_default=True)
def main(environments: Path | None, samples: int, tokens: int, repeats: int, layers: int) -> None:
    """Measure everything in turn, several times over."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    windows_NT = torch.randint(3, 32000, (samples, tokens), generator=torch.Generator().manual_seed(0))
    began = time.process_time()
    model_map = map_model(model)
    map_seconds = time.process_time() - began

    def ours(method: str, options: dict[str, object]) -> float:
        tried = copy.deepcopy(model)
        began = time.process_time()
        apply_passes(
            tried,
            model_map,
            (PASSES[method](**options),),
            windows_NT,
            batch=8,
            device=torch.device("cpu"),
            storage_dtype=torch.float32,
            progress=Silent(),
        )
        return time.process_time() - began

    rows: dict[tuple[str, str], dict[str, list[float]]] = {}
    peer_versions = {}
    forwards = [forward(model, windows_NT)]
    with tempfile.TemporaryDirectory() as folder:
        if environments:
            model.save_pretrained(folder)
            for file in find_source("builtin:books-llama").folder.glob("tokenizer*"):
                (Path(folder) / file.name).write_bytes(file.read_bytes())  # the peer asks for one and does not use it
        for _ in range(repeats):
            for share, (options, structure) in SHARES.items():
                for method in METHODS:
                    row = rows.setdefault((share, method), {"ours": [], "peer": []})
                    seconds = ours(method, options)
                    forwards.append(forward(model, windows_NT))
                    row["ours"].append(seconds / (sum(forwards[-2:]) / 2))
                    if environments:
                        what = ["--method", method, "--sparsity", "0.5", "--structure", structure]
                        data = ["--random", str(samples), str(tokens), "--batch", "8", "--forwards", "1"]
                        found = run_in(
                            "llm-compressor", "llm_compressor.py", [folder, *what, *data], folder=environments
                        )
                        row["peer"].append(found["cpu_seconds"] / median(found["forward_cpu_seconds"]))
                        peer_versions = found["versions"]
                    click.echo(f"{share} {method}: {row} forward {forwards[-1]:.2f} s", err=True)
    facts = {
        "peer": "llm-compressor",
        "parameters": model.num_parameters(),
        "samples": samples,
        "tokens": tokens,
        "rows": [{"share": share, "method": method, **row} for (share, method), row in rows.items()],
        "forward_cpu_seconds": forwards,
        "map_cpu_seconds": map_seconds,
        "peer_versions": peer_versions,
        "versions": versions(),
        "machine": machine(),
    }
    path = Path(__file__).parent.parent / "results" / "peers-sparse-seconds.json"
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(str(path))


@torch.no_grad()
def forward(model: PreTrainedModel, windows_NT: Tensor) -> float:
    """CPU seconds of one plain pass over all windows."""
    began = time.process_time()
    for ids_BT in windows_NT.split(8):
        model(input_ids=ids_BT, use_cache=False)
    return time.process_time() - began


if __name__ == "__main__":
    main()
