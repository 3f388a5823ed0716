"""Prune or quantize? Both at the same bytes, on a text like the training text and on one unlike it.

    python evals/equal_bytes.py --name books-llama --hard other.txt
    python evals/equal_bytes.py --model FOLDER --calibration train.txt --easy test.txt --hard other.txt --name NAME

Bits per weight of the linears in the blocks. Zeros are charged what the tightest common sparse format would take: the
values that are left in 16 bits and one bit per place. No loader here stores them so; on disk they are as large as dense
(the last column). Source of the question: Yin et al., arXiv 2310.02277 (small weights matter for hard tasks); Kuzmin et
al., arXiv 2307.02973 (pruning against quantization). Writes evals/results/equal-bytes-NAME.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from trial import Setting, run_trial

from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.perplexity import perplexity
from llmcompress.progress import Silent

VALUE_BITS, PLACE_BITS = 16, 1


def zeros(passes: str, sparsity: float) -> tuple[str, float, float]:
    """Recipe, bits charged, bits on disk of a pruned model."""
    return passes.format(sparsity=sparsity), VALUE_BITS * (1 - sparsity) + PLACE_BITS, VALUE_BITS


METHODS = {
    "dense": ("", VALUE_BITS, VALUE_BITS),
    "rtn int8, one scale per output": ("- rtn: {scheme: int8_channel}", 8.1, 8.1),
    "magnitude 50 %": zeros("- magnitude: {{sparsity: {sparsity}}}", 0.5),
    "wanda 50 %": zeros("- wanda: {{sparsity: {sparsity}}}", 0.5),
    "sparsegpt 50 %": zeros("- sparsegpt: {{sparsity: {sparsity}}}", 0.5),
    "gptq int4, groups of 32": ("- gptq: {scheme: int4_g32, on_indivisible: pad}", 4.5, 4.5),
    "sparsegpt 75 %": zeros("- sparsegpt: {{sparsity: {sparsity}}}", 0.75),
    "gptq int3, groups of 32": ("- gptq: {scheme: int3_g32, on_indivisible: pad}", 3.5, 4.5),
    "sparsegpt 50 % and int4, groups of 32": (
        "- sparsegpt: {sparsity: 0.5}\n- gptq: {scheme: int4_g32, on_indivisible: pad}",
        4 / 2 + PLACE_BITS + 0.5,
        4.5,
    ),
}
"""Name → passes, bits per weight charged, bits per weight on disk."""


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--easy", default="builtin:evaluation", show_default=True, help="held-out text like the training text")
@click.option("--hard", required=True, help="held-out text unlike it")
@click.option("--name", required=True, help="of the result file")
@click.option("--max-windows", default=40, show_default=True)
def main(model: str, calibration: str, easy: str, hard: str, name: str, max_windows: int) -> None:
    """Measure every method on both texts."""
    torch.set_num_threads(1)
    setting = Setting(model, calibration, easy, max_windows=max_windows)
    other = setting.task.model_copy(update={"source": hard})
    rows = []
    for method, (passes, bits, bits_on_disk) in METHODS.items():
        trial = run_trial(setting, passes)
        harder = perplexity(trial.model, trial.tokenizer, other, device=torch.device("cpu"), progress=Silent())
        row = {"method": method, "bits": bits, "bits_on_disk": bits_on_disk}
        rows.append(row | {"easy": trial.perplexity.perplexity, "hard": harder.perplexity})
        click.echo(str(rows[-1]), err=True)
    facts = {
        "model": name,
        "easy": Path(easy).name,
        "hard": Path(hard).name,
        "rows": rows,
        "versions": versions(),
        "machine": machine(),
    }
    path = Path(__file__).parent / "results" / f"equal-bytes-{name}.json"
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(str(path))


if __name__ == "__main__":
    main()
