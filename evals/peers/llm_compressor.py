"""Runs in the environment of llm-compressor: prunes a model folder with one of its modifiers, as its documents say.

    python llm_compressor.py MODEL --method sparsegpt --sparsity 0.5 --structure 0:0 --windows W.safetensors --out OUT

Writes the dense result as a safetensors file (when `--out` is given) and prints seconds, versions and zeros as JSON.
Without `--windows`, random tokens of the given size. CPU seconds are those of this process: run it with one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import compressed_tensors
import llmcompressor
import torch
import transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file, save_file

MODIFIERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def main() -> None:
    """Prune once."""
    options = argparse.ArgumentParser()
    options.add_argument("model", type=Path)
    options.add_argument("--method", choices=MODIFIERS, required=True)
    options.add_argument("--sparsity", type=float, required=True)
    options.add_argument("--structure", default="0:0", help="0:0 is unstructured")
    options.add_argument("--windows", type=Path)
    options.add_argument("--random", type=int, nargs=2, metavar=("SAMPLES", "TOKENS"))
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--forwards", type=int, default=0, help="plain forward passes to time before and after")
    options.add_argument("--out", type=Path)
    chosen = options.parse_args()

    model = transformers.AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    if chosen.windows:
        windows = load_file(chosen.windows)["windows"]
    else:
        windows = torch.randint(3, model.config.vocab_size, chosen.random, generator=torch.Generator().manual_seed(0))
    forwards = [seconds_of_forward(model, windows) for _ in range(chosen.forwards)]
    data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    modifier = MODIFIERS[chosen.method](
        sparsity=chosen.sparsity, mask_structure=chosen.structure, targets=["Linear"], ignore=["re:.*lm_head"]
    )
    began, cpu_began = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        dataset=data,
        recipe=modifier,
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
        batch_size=chosen.batch,
    )
    cpu_seconds, seconds = time.process_time() - cpu_began, time.perf_counter() - began
    forwards += [seconds_of_forward(model, windows) for _ in range(chosen.forwards)]
    weights = [
        m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name
    ]
    if chosen.out:
        shared = {model.lm_head.weight.data_ptr()} if model.config.tie_word_embeddings else set()
        state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight" or not shared}
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, chosen.out)
    found = {
        "cpu_seconds": cpu_seconds,
        "seconds": seconds,
        "forward_cpu_seconds": forwards,
        "zeros": sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights),
        "versions": {
            "llmcompressor": llmcompressor.__version__,
            "transformers": transformers.__version__,
            "compressed-tensors": compressed_tensors.__version__,
            "torch": torch.__version__,
        },
    }
    print(json.dumps(found))


@torch.no_grad()
def seconds_of_forward(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """CPU seconds of one plain pass over all windows."""
    began = time.process_time()
    for ids in windows.split(8):
        model(input_ids=ids, use_cache=False)
    return time.process_time() - began


if __name__ == "__main__":
    main()
