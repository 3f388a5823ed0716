"""Runs in the environment of GPTQModel: quantizes a model folder, as its documents say.

    python gptqmodel_codes.py MODEL --method gptq --bits 3 --group 32 --windows W.safetensors --out OUT

Writes the dense weights that its packed codes stand for as a safetensors file, and prints seconds and versions as
JSON. CPU seconds are those of this process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file, save_file

METHODS: dict[str, dict[str, Any]] = {
    "gptq": {},
    "gptq, range mse": {"mse": 2.0},
    "gptq, act-order": {"desc_act": True, "act_group_aware": False},
    "awq": {"method": "awq", "format": "gemm"},
}
"""What is set beside bits, group and symmetry; all else is its default."""


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

    windows = load_file(chosen.windows)["windows"]
    config = QuantizeConfig(
        bits=chosen.bits,
        group_size=chosen.group,
        sym=not chosen.asymmetric,
        device="cpu",
        offload_to_disk=False,
        **METHODS[chosen.method],
    )
    data = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in windows]
    model = GPTQModel.load(str(chosen.model), config, backend=BACKEND.TORCH, dtype=torch.float32)
    began, cpu_began = time.perf_counter(), time.process_time()
    model.quantize(data, batch_size=8, calibration_sort=None, backend=BACKEND.TORCH)
    cpu_seconds, seconds = time.process_time() - cpu_began, time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        packed = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
        state = dense_state(packed.model)
    rounded = state.pop("rounded")
    save_file(state, chosen.out)
    versions = {name: version(name) for name in ("gptqmodel", "transformers", "torch")}
    print(json.dumps({"cpu_seconds": cpu_seconds, "seconds": seconds, "rounded": int(rounded), "versions": versions}))


def dense_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of the packed linears; nothing else of the model changed. `rounded`: how many."""
    state: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            state[f"{name}.weight"] = module.dequantize_weight().T.float().contiguous()
    return {**state, "rounded": torch.tensor(len(state))}


if __name__ == "__main__":
    main()
