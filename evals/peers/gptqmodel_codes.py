"""Runs in the environment of GPTQModel: quantizes a model folder, as its documents say.

    python gptqmodel_codes.py MODEL --method gptq --bits 3 --group 32 --windows W.safetensors --out OUT

Writes the dense weights that its packed codes stand for as a safetensors file, and prints seconds and versions as
JSON. CPU seconds are those of this process.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from handover import Stopwatch, arguments, hand_over, windows_of

METHODS: dict[str, dict[str, Any]] = {
    "gptq": {},
    "gptq, range mse": {"mse": 2.0},
    "gptq, act-order": {"desc_act": True, "act_group_aware": False},
    "awq": {"method": "awq", "format": "gemm"},
}
"""What is set beside bits, group and symmetry; all else is its default."""


def main() -> None:
    """Quantize once."""
    chosen = arguments(METHODS).parse_args()
    windows = windows_of(chosen)
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
    with Stopwatch() as taken:
        model.quantize(data, batch_size=8, calibration_sort=None, backend=BACKEND.TORCH)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        packed = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
        state = dense_state(packed.model)
    hand_over(state, chosen, taken, ("gptqmodel", "transformers", "torch"), rounded=len(state))


def dense_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of the packed linears; nothing else of the model changed."""
    state: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            state[f"{name}.weight"] = module.dequantize_weight().T.float().contiguous()
    return state


if __name__ == "__main__":
    main()
