"""Runs in the environment of AutoRound: quantizes a model folder, as its documents say.

    python auto_round_codes.py MODEL --method autoround --bits 3 --group 32 --windows W.safetensors --out OUT

Writes the dense weights that its codes stand for as a safetensors file, and prints seconds and versions as JSON. CPU
seconds are those of this process.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from auto_round import AutoRound
from safetensors.torch import load_file, save_file

METHODS = {"autoround": 200, "rtn, their ranges": 0}
"""Name → steps of signed gradient descent per block; 200 is its default."""


def main() -> None:
    """Quantize once."""
    options = argparse.ArgumentParser()
    options.add_argument("model", type=Path)
    options.add_argument("--method", choices=METHODS, required=True)
    options.add_argument("--bits", type=int, required=True)
    options.add_argument("--group", type=int, required=True)
    options.add_argument("--asymmetric", action="store_true")
    options.add_argument("--windows", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    chosen = options.parse_args()

    model = transformers.AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chosen.model)
    dense = {name: value.detach().clone() for name, value in model.named_parameters()}
    windows = load_file(chosen.windows)["windows"]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows.split(8)]
    began, cpu_began = time.perf_counter(), time.process_time()
    rounding = AutoRound(
        model,
        tokenizer=tokenizer,
        bits=chosen.bits,
        group_size=chosen.group,
        sym=not chosen.asymmetric,
        iters=METHODS[chosen.method],
        dataset=batches,
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=8,
        amp=False,
        enable_torch_compile=False,
        device_map="cpu",
    )
    found, _ = rounding.quantize()
    cpu_seconds, seconds = time.process_time() - cpu_began, time.perf_counter() - began
    state = {name: value.detach().float().contiguous() for name, value in found.named_parameters() if name in dense}
    rounded = sum(not torch.equal(value, dense[name]) for name, value in state.items())
    save_file(state, chosen.out)
    versions = {name: version(name) for name in ("auto-round", "transformers", "torch")}
    print(json.dumps({"cpu_seconds": cpu_seconds, "seconds": seconds, "rounded": rounded, "versions": versions}))


if __name__ == "__main__":
    main()
