"""Runs in the environment of llm-compressor: quantizes a model folder with its modifiers, as its documents say.

    python llm_compressor_codes.py MODEL --method gptq --bits 3 --group 32 --windows W.safetensors --out OUT

Writes the dense weights that its codes stand for as a safetensors file, and prints seconds and versions as JSON. CPU
seconds are those of this process. Its AWQ stops on a machine without an accelerator where it pins memory; pinning
changes no number, so it is left out here (`--as-it-is`: not left out).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import compressed_tensors
import llmcompressor
import torch
import transformers
from compressed_tensors.quantization import forward_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file, save_file

METHODS = ("gptq", "gptq, range mse", "awq", "awq→gptq")


def modifiers(method: str, scheme: dict[str, Any]) -> list[Any]:
    """What `oneshot` is asked to do; all else is its default."""
    if method.endswith("mse"):
        scheme = {**scheme, "weights": {**scheme["weights"], "observer": "mse"}}
    places: dict[str, Any] = {"config_groups": {"group_0": {"targets": ["Linear"], **scheme}}, "ignore": ["lm_head"]}
    rounds = QuantizationModifier if method == "awq" else GPTQModifier
    return [AWQModifier(), rounds(**places)] if method.startswith("awq") else [rounds(**places)]


def main() -> None:
    """Quantize once."""
    options = argparse.ArgumentParser()
    options.add_argument("model", type=Path)
    options.add_argument("--method", choices=METHODS, required=True)
    options.add_argument("--bits", type=int, required=True)
    options.add_argument("--group", type=int, required=True)
    options.add_argument("--asymmetric", action="store_true")
    options.add_argument("--as-it-is", action="store_true")
    options.add_argument("--windows", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    chosen = options.parse_args()

    if not chosen.as_it_is and not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None
    model = transformers.AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    windows = load_file(chosen.windows)["windows"]
    data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    weights = {"num_bits": chosen.bits, "type": "int", "symmetric": not chosen.asymmetric, "strategy": "group"}
    scheme = {"weights": {**weights, "group_size": chosen.group}}
    began, cpu_began = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        dataset=data,
        recipe=modifiers(chosen.method, scheme),
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
        batch_size=8,
    )
    cpu_seconds, seconds = time.process_time() - cpu_began, time.perf_counter() - began
    state = {name: value for name, value in model.state_dict().items() if name.endswith(("weight", "bias"))}
    rounded = 0
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is not None:
            quantization = module.quantization_scheme.weights
            state[f"{name}.weight"] = forward_quantize(module, module.weight, "weight", quantization)
            rounded += 1
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file({name: value.detach().contiguous() for name, value in state.items()}, chosen.out)
    versions = {
        "llmcompressor": llmcompressor.__version__,
        "transformers": transformers.__version__,
        "compressed-tensors": compressed_tensors.__version__,
        "torch": torch.__version__,
    }
    print(json.dumps({"cpu_seconds": cpu_seconds, "seconds": seconds, "rounded": rounded, "versions": versions}))


if __name__ == "__main__":
    main()
