"""Runs in the environment of AutoRound: quantizes a model folder, as its documents say.

    python auto_round_codes.py MODEL --method autoround --bits 3 --group 32 --windows W.safetensors --out OUT

Writes the dense weights that its codes stand for as a safetensors file, and prints seconds and versions as JSON. CPU
seconds are those of this process.
"""

from __future__ import annotations

import torch
import transformers
from auto_round import AutoRound
from handover import Stopwatch, arguments, hand_over, windows_of

METHODS = {"autoround": 200, "rtn, their ranges": 0}
"""Name → steps of signed gradient descent per block; 200 is its default."""


def main() -> None:
    """Quantize once."""
    chosen = arguments(METHODS).parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chosen.model)
    dense = {name: value.detach().clone() for name, value in model.named_parameters()}
    windows = windows_of(chosen)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows.split(8)]
    with Stopwatch() as taken:
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
    state = {name: value.detach().float().contiguous() for name, value in found.named_parameters() if name in dense}
    rounded = sum(not torch.equal(value, dense[name]) for name, value in state.items())
    hand_over(state, chosen, taken, ("auto-round", "transformers", "torch"), rounded=rounded)


if __name__ == "__main__":
    main()
