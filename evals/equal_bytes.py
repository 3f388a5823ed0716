"""Pruning against quantization at equal bytes, on easy and on hard tokens.

    python evals/equal_bytes.py --name books-llama

Easy tokens are the half of the measured text that the dense model predicts best, hard ones the other half. Bytes are
those of the linears in the blocks: 16 bits for a dense weight; for zeros 16 bits for each weight that is left and one
bit of mask for every weight, which no format in use here stores; codes with their scales. Nothing is trained
afterwards. Writes evals/results/equal-bytes-NAME.json.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.nn import functional
from trial import Setting, Trial, run_trial

from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.perplexity import evaluation_text
from llmcompress.model.probe import map_model
from llmcompress.modules.quant_linear import QuantLinear

DENSE = 16
TRIALS = (
    ("dense", ""),
    ("8 bits, rounded", "- rtn: {scheme: int8_g32}"),
    ("50 % zeros, magnitude", "- magnitude: {sparsity: 0.5}"),
    ("50 % zeros, SparseGPT", "- sparsegpt: {sparsity: 0.5}"),
    ("half the width", "- width: {ratio: 0.5}"),
    ("4 bits, GPTQ", "- gptq: {scheme: int4_g32}"),
    ("75 % zeros, SparseGPT", "- sparsegpt: {sparsity: 0.75}"),
    ("half the width, then 8 bits", "- width: {ratio: 0.5, round_to: 32}\n- gptq: {scheme: int8_g32}"),
)


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True)
@click.option("--name", required=True)
def main(model: str, calibration: str, text: str, name: str) -> None:
    """Measure every trial once, on the same calibration windows."""
    setting = Setting(model, calibration, text)
    rows, easy_N, weights = [], torch.empty(0), 0
    for label, passes in TRIALS:
        trial = run_trial(setting, passes)
        losses_N = token_losses(trial, setting)
        if not passes:
            weights = block_bits(trial) // DENSE
            easy_N = losses_N <= losses_N.median()
        row = {
            "method": label,
            "bits_per_dense_weight": round(block_bits(trial) / weights, 3),
            "perplexity": math.exp(float(losses_N.mean())),
            "easy": math.exp(float(losses_N[easy_N].mean())),
            "hard": math.exp(float(losses_N[~easy_N].mean())),
        }
        rows.append(row)
        click.echo(str(row), err=True)
    facts = {
        "model": name,
        "text": Path(text).name,
        "window": setting.window,
        "tokens": len(easy_N),
        "rows": rows,
        "versions": versions(),
        "machine": machine(),
    }
    path = Path(__file__).parent / "results" / f"equal-bytes-{name}.json"
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(str(path))


@torch.no_grad()
def token_losses(trial: Trial, setting: Setting) -> Tensor:
    """The loss of every predicted token, in the order of the text."""
    text = evaluation_text(setting.task, trial.tokenizer, trial.model.config)
    found = []
    for window_T in text.windows:
        logits_TV = trial.model(input_ids=window_T[None], use_cache=False).logits[0, :-1].float()
        found.append(functional.cross_entropy(logits_TV, window_T[1:], reduction="none"))
    return torch.cat(found)


def block_bits(trial: Trial) -> int:
    """Bits of all linears in the blocks."""
    names = map_model(trial.model).site_names()
    return sum(stored_bits(trial.model.get_submodule(name)) for name in names)


def stored_bits(module: nn.Module) -> int:
    """Bits of one linear, as the head of this file says."""
    if isinstance(module, QuantLinear):
        each = module.scheme.bits_per_weight(module.out_features, module.in_features, DENSE)
        return round(each * module.out_features * module.in_features)
    weight = module.get_parameter("weight")
    left = int(weight.count_nonzero())
    return min(weight.numel() * DENSE, left * DENSE + weight.numel())


if __name__ == "__main__":
    main()
