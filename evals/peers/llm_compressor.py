"""Runs in the environment of llm-compressor: its modifiers on a model folder, as its documents say.

    python llm_compressor.py MODEL --method sparsegpt --sparsity 0.5 --structure 0:0 --windows W.safetensors --out OUT
    python llm_compressor.py MODEL --method gptq --bits 3 --group 32 --windows W.safetensors --out OUT

Writes the dense weights (of codes: what they stand for) as a safetensors file and prints seconds, versions, zeros and
the number of rounded linears as JSON. CPU seconds are those of this process: run it with one thread. Its AWQ stops on a
machine without an accelerator where it pins memory; pinning changes no number, so it is left out here (`--as-it-is`:
not left out).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import transformers
from compressed_tensors.quantization import forward_quantize
from datasets import Dataset
from handover import Stopwatch, arguments, hand_over, windows_of
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache

PRUNING = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}
METHODS = (*PRUNING, "gptq", "gptq, range mse", "awq", "awq→gptq", "smoothquant→gptq")


def modifiers(chosen: argparse.Namespace) -> list[Any]:
    """What `oneshot` is asked to do; all else is its default."""
    method: str = chosen.method
    if method in PRUNING:
        places = {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}
        return [PRUNING[method](sparsity=chosen.sparsity, mask_structure=chosen.structure, **places)]
    grouped = {"strategy": "group", "group_size": chosen.group} if chosen.group else {"strategy": "channel"}
    weights = {"num_bits": chosen.bits, "type": "int", "symmetric": not chosen.asymmetric, **grouped}
    if method.endswith("mse"):
        weights["observer"] = "mse"
    scheme: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if chosen.activations:
        inputs = {"num_bits": chosen.activations, "type": "int", "symmetric": True, "strategy": "token"}
        scheme["input_activations"] = {**inputs, "dynamic": True}
    rounds = QuantizationModifier if method == "awq" else GPTQModifier
    first = {"awq": [AWQModifier()], "smoothquant": [SmoothQuantModifier()]}.get(method.split("→")[0], [])
    return [*first, rounds(config_groups={"group_0": scheme}, ignore=["lm_head"])]


def main() -> None:
    """Compress once."""
    options = arguments(METHODS)
    options.add_argument("--activations", type=int, help="bits of inputs, rounded per token")
    options.add_argument("--sparsity", type=float)
    options.add_argument("--structure", default="0:0", help="0:0 is unstructured")
    options.add_argument("--forwards", type=int, default=0, help="plain forward passes to time before and after")
    options.add_argument("--as-it-is", action="store_true")
    chosen = options.parse_args()

    if not chosen.as_it_is and not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None
    model = transformers.AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    windows = windows_of(chosen)
    forwards = [seconds_of_forward(model, windows) for _ in range(chosen.forwards)]
    data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    with Stopwatch() as taken:
        oneshot(
            model=model,
            dataset=data,
            recipe=modifiers(chosen),
            num_calibration_samples=len(windows),
            max_seq_length=windows.shape[1],
            shuffle_calibration_samples=False,
            batch_size=8,
        )
    forwards += [seconds_of_forward(model, windows) for _ in range(chosen.forwards)]
    state = {name: value for name, value in model.state_dict().items() if name.endswith(("weight", "bias"))}
    rounded = 0
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is not None:
            codes = module.quantization_scheme.weights
            state[f"{name}.weight"] = forward_quantize(module, module.weight, "weight", codes)
            rounded += 1
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    linears = [
        each.weight
        for name, each in model.named_modules()
        if isinstance(each, torch.nn.Linear) and "lm_head" not in name
    ]
    hand_over(
        state,
        chosen,
        taken,
        ("llmcompressor", "transformers", "compressed-tensors", "torch"),
        rounded=rounded,
        zeros=sum(int((each == 0).sum()) for each in linears) / sum(each.numel() for each in linears),
        forward_cpu_seconds=forwards,
    )


@torch.no_grad()
def seconds_of_forward(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """CPU seconds of one plain pass over all windows."""
    began = time.process_time()
    for ids in windows.split(8):
        model(input_ids=ids, use_cache=False)
    return time.process_time() - began


if __name__ == "__main__":
    main()
