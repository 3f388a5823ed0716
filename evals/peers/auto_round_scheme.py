"""Runs in the environment of AutoRound: lets AutoScheme choose the bits of every linear, then rounds with them.

    python auto_round_scheme.py MODEL --method rtn --average 3.25 --group 64 --windows W.safetensors --out OUT

Candidates are symmetric codes of 2, 3, 4 and 8 bits in groups of GROUP, and `--average` counts a scale of 16 bits a
group, as ours does. Writes the dense weights that the codes stand for, and prints seconds, versions and the bits of
every linear as JSON. CPU seconds are those of this process.
"""

from __future__ import annotations

import hashlib
from typing import Any

import datasets
import torch
import transformers
from auto_round import AutoRound, AutoScheme
from auto_round.calib_dataset import register_dataset
from auto_round.schemes import QuantizationScheme
from handover import Stopwatch, arguments, hand_over, windows_of

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"iters": 0, "amp": False},
    "autoround light, bfloat16": {"iters": 50, "lr": 5e-3, "amp": True},
}
BITS = (2, 3, 4, 8)


def main() -> None:
    """Choose and quantize once."""
    options = arguments(METHODS)
    options.add_argument("--average", type=float, required=True, help="bits per weight, scales included")
    chosen = options.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chosen.model)
    dense = {name: value.detach().clone() for name, value in model.named_parameters()}
    windows = windows_of(chosen)
    count, length = windows.shape
    rows = [{"input_ids": ids.tolist(), "attention_mask": [1] * length} for ids in windows]
    # it takes the name of a dataset, and keeps scores on disk under that name
    name = f"windows_{hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:12]}"
    register_dataset(name)(lambda **_: datasets.Dataset.from_list(rows))
    scheme = AutoScheme(
        avg_bits=chosen.average - 16 / chosen.group,
        options=[QuantizationScheme(bits=bits, group_size=chosen.group, sym=True) for bits in BITS],
        ignore_scale_zp_bits=True,  # it counts zero points, which symmetric codes have not
        nsamples=count,
        seqlen=length,
        batch_size=8,
    )
    with Stopwatch() as taken:
        rounding = AutoRound(
            model,
            tokenizer=tokenizer,
            scheme=scheme,
            dataset=name,
            nsamples=count,
            seqlen=length,
            batch_size=8,
            enable_torch_compile=False,
            device_map="cpu",
            **METHODS[chosen.method],
        )
        found, layers = rounding.quantize()
    state = {name: value.detach().float().contiguous() for name, value in found.named_parameters() if name in dense}
    bits = {name: layer["bits"] for name, layer in layers.items() if layer["bits"] < 16}
    hand_over(state, chosen, taken, ("auto-round", "transformers", "torch"), bits=bits)


if __name__ == "__main__":
    main()
