"""How long mapping an unknown family takes, for blocks of width 1024 (and others), from the config alone.

    python evals/map_time.py

Writes evals/results/map-time.json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import torch
from transformers import AutoConfig

from llmcompress.evaluation.environment import machine, versions
from llmcompress.model.probe import probe

SHAPES = {
    "llama 1024 / 4096": {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096},
    "gpt2 1024 / 4096": {"model_type": "gpt2", "n_embd": 1024, "n_inner": 4096, "n_head": 16},
    "phi3 1024 / 4096": {"model_type": "phi3", "hidden_size": 1024, "intermediate_size": 4096, "pad_token_id": 0},
}
LLAMA_LIKE = {"num_attention_heads": 16, "num_key_value_heads": 4, "num_hidden_layers": 24, "vocab_size": 32000}


@click.command()
def main() -> None:
    """Time `probe` on each shape."""
    torch.set_num_threads(2)
    rows = []
    for label, shape in SHAPES.items():
        options = dict(shape)
        family = str(options.pop("model_type"))
        common = {} if family == "gpt2" else LLAMA_LIKE
        config = AutoConfig.for_model(family, **{**common, **options})
        start = time.perf_counter()
        found = probe(config)
        seconds = time.perf_counter() - start
        structure = found.blocks[0].structure
        rows.append({"shape": label, "seconds": seconds, "sites": len(structure.sites), "folds": len(structure.folds)})
        click.echo(f"{label:24s} {seconds:.1f} s, {len(structure.sites)} sites, {len(structure.folds)} folds", err=True)
    path = Path(__file__).parent / "results" / "map-time.json"
    path.write_text(json.dumps({"rows": rows, "versions": versions(), "machine": machine()}, indent=1) + "\n")
    click.echo(str(path))


if __name__ == "__main__":
    main()
