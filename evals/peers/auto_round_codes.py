"""Runs in the environment of AutoRound: quantizes a model folder, as its documents say.

    python auto_round_codes.py MODEL --method autoround --bits 3 --group 32 --windows W.safetensors --out OUT

Writes the dense weights that its codes stand for as a safetensors file, and prints seconds and versions as JSON. CPU
seconds are those of this process. `--blocks 12,13,14` leaves all other blocks dense.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from auto_round import AutoRound
from handover import Stopwatch, arguments, hand_over, windows_of

METHODS: dict[str, dict[str, Any]] = {
    "autoround": {"iters": 200, "amp": False},
    "autoround, bfloat16": {"iters": 200, "amp": True},
    "autoround light, bfloat16": {"iters": 50, "lr": 5e-3, "amp": True},
    "rtn, their ranges": {"iters": 0, "amp": False},
}
"""200 steps of signed gradient descent a block are its default, and so is computing them in bfloat16; `light` is its
own recipe of that name."""


def main() -> None:
    """Quantize once."""
    options = arguments(METHODS)
    options.add_argument("--blocks", help="numbers of the blocks to quantize, by commas; without it all of them")
    chosen = options.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chosen.model)
    dense = {name: value.detach().clone() for name, value in model.named_parameters()}
    windows = windows_of(chosen)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows.split(8)]
    some = {"to_quant_block_names": rf"\.({chosen.blocks.replace(',', '|')})$"} if chosen.blocks else {}
    with Stopwatch() as taken:
        rounding = AutoRound(
            model,
            tokenizer=tokenizer,
            bits=chosen.bits,
            group_size=chosen.group,
            sym=not chosen.asymmetric,
            dataset=batches,
            nsamples=len(windows),
            seqlen=windows.shape[1],
            batch_size=8,
            enable_torch_compile=False,
            device_map="cpu",
            **METHODS[chosen.method],
            **some,
        )
        found, _ = rounding.quantize()
    state = {name: value.detach().float().contiguous() for name, value in found.named_parameters() if name in dense}
    rounded = sum(not torch.equal(value, dense[name]) for name, value in state.items())
    hand_over(state, chosen, taken, ("auto-round", "transformers", "torch"), rounded=rounded)


if __name__ == "__main__":
    main()
