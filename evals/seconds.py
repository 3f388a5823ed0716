"""What quantizing costs: CPU seconds of one thread ÷ those of plain forward passes over the same calibration tokens.

    OMP_NUM_THREADS=1 python evals/seconds.py
    OMP_NUM_THREADS=1 python evals/seconds.py --growth

A Llama of 110 M random weights (costs do not depend on them), float32. A forward pass, logits included, is timed right
before and after every method in the same process, because the speed of a shared machine drifts. Mapping, loading and
saving are left out. `--growth`: how the seconds of gptq and awq grow with samples, blocks and width, and the exponents.
Writes evals/results/seconds.json after every row.
"""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from llmcompress.evaluation.environment import machine, versions
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe

METHODS = {
    "rtn int4_g128": ("- rtn: {scheme: int4_g128}", (8,)),
    "gptq int4_g128": ("- gptq: {scheme: int4_g128}", (8, 32)),
    "awq int4_g128_asym": ("- awq: {scheme: int4_g128_asym}", (8,)),
    "smoothquant → gptq int8": ("- smoothquant: {}\n- gptq: {scheme: int8_channel_a8token}", (8,)),
}
"""Name → passes, numbers of samples of 512 tokens."""
GROWTH = ("gptq int4_g128", "awq int4_g128_asym")
BASE = {"blocks": 4, "width": 768, "samples": 8}
SERIES = {"blocks": (2, 4, 8), "width": (384, 768, 1536), "samples": (4, 8, 16)}
PATH = Path(__file__).parent / "results" / "seconds.json"


@click.command()
@click.option("--growth", is_flag=True, help="measure growth instead of the table of methods")
@click.option("--repeats", default=1, show_default=True)
def main(growth: bool, repeats: int) -> None:
    """Measure, and keep what the file has of the other kind."""
    torch.set_num_threads(1)
    facts: dict[str, Any] = json.loads(PATH.read_text()) if PATH.exists() else {"rows": [], "growth": []}
    if growth:
        facts["growth"] = []
        for name in GROWTH:
            for what, values in SERIES.items():
                seconds = [measured(METHODS[name][0], **{**BASE, what: value})["seconds"] for value in values]
                row = {"method": name, "by": what, "values": values, "seconds": seconds}
                facts["growth"].append(row | {"exponent": slope(values, seconds)})
                click.echo(str(facts["growth"][-1]), err=True)
                write(facts)
        return
    facts["rows"] = []
    for name, (passes, counts) in METHODS.items():
        for samples in counts:
            found = [measured(passes, blocks=12, width=768, samples=samples) for _ in range(repeats)]
            forwards = [each["seconds"] / each["forward"] for each in found]
            facts["rows"].append({"method": name, "samples": samples, "forwards": forwards})
            click.echo(str(facts["rows"][-1]), err=True)
            write(facts)


def write(facts: dict[str, Any]) -> None:
    """The result file."""
    facts |= {"tokens": 512, "parameters": 110_000_000, "versions": versions(), "machine": machine()}
    PATH.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def measured(passes: str, *, blocks: int, width: int, samples: int) -> dict[str, float]:
    """CPU seconds of the passes, and of one forward pass."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    windows_NT = torch.randint(3, 32000, (samples, 512), generator=torch.Generator().manual_seed(0))
    chosen = parse_recipe("passes:\n" + passes, "evals").passes
    uses_data = any(each.uses_data() for each in chosen)
    model_map = map_model(model)
    before = forward(model, windows_NT)
    tried = copy.deepcopy(model)
    began = time.process_time()
    apply_passes(
        tried,
        model_map,
        chosen,
        windows_NT if uses_data else windows_NT[:0],
        batch=8,
        device=torch.device("cpu"),
        storage_dtype=torch.float16,
        progress=Silent(),
    )
    seconds = time.process_time() - began
    return {"seconds": seconds, "forward": (before + forward(model, windows_NT)) / 2}


@torch.no_grad()
def forward(model: PreTrainedModel, windows_NT: Tensor) -> float:
    """CPU seconds of one plain pass over all windows."""
    began = time.process_time()
    for ids_BT in windows_NT.split(8):
        model(input_ids=ids_BT, use_cache=False)
    return time.process_time() - began


def slope(values: tuple[int, ...], seconds: list[float]) -> float:
    """The exponent p of seconds ∝ valueᵖ, by least squares on logarithms."""
    x, y = [math.log(value) for value in values], [math.log(each) for each in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


if __name__ == "__main__":
    main()
