"""Runs in the environment of NVIDIA ModelOpt: lets AutoQuantize choose the bits of every linear.

    python auto_quantize.py MODEL --method gradient --average 3.25 --group 64 --windows W.safetensors --out OUT

Candidates are symmetric codes of 2, 3, 4 and 8 bits in groups of GROUP; `--average` counts a scale of 16 bits a group,
as ours does. Its loss is cross-entropy, and linears that share an input get one format, both as in its examples. Writes
the dense weights of its own rounding, and prints seconds, versions and the bits of every linear as JSON.
"""

from __future__ import annotations

from typing import Any

import modelopt.torch.quantization as mtq
import torch
import transformers
from handover import Stopwatch, arguments, hand_over, windows_of
from torch.nn import functional

BITS = (2, 3, 4, 8)


def candidate(bits: int, group: int) -> dict[str, Any]:
    """Weight-only codes, ranges by the largest magnitude."""
    weights = {"num_bits": bits, "block_sizes": {-1: group}, "effective_bits": bits + 16 / group}
    return {
        "quant_cfg": [
            {"quantizer_name": "*weight_quantizer", "cfg": weights},
            {"quantizer_name": "*input_quantizer", "enable": False},
            {"quantizer_name": "*output_quantizer", "enable": False},
        ],
        "algorithm": "max",
    }


def main() -> None:
    """Choose and quantize once."""
    options = arguments({"gradient": {}, "kl_div": {}})
    options.add_argument("--average", type=float, required=True, help="bits per weight, scales included")
    chosen = options.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    windows = windows_of(chosen)
    batches = [{"input_ids": ids[None]} for ids in windows]
    with Stopwatch() as taken:
        model, _ = mtq.auto_quantize(
            model,
            constraints={
                "effective_bits": chosen.average,
                "cost": {"excluded_module_name_patterns": ["*lm_head*"]},
            },
            quantization_formats=[candidate(bits, chosen.group) for bits in BITS],
            data_loader=batches,
            forward_step=lambda model, batch: model(**batch).logits,
            loss_func=lambda logits, batch: functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()
            ),
            disabled_layers="*lm_head*",
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
            method=chosen.method,
        )
    bits, dense = {}, {}
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is None or "lm_head" in name:
            continue
        bits[name] = int(quantizer.num_bits) if quantizer.is_enabled else 16
        with torch.no_grad():
            dense[f"{name}.weight"] = quantizer(module.weight).detach().clone()
    hand_over(dense, chosen, taken, ["nvidia-modelopt", "transformers", "torch"], bits=bits)


if __name__ == "__main__":
    main()
