"""What deciding per input costs in perplexity and brings in tokens per second, on trained models and on a 110 M shape.

    python evals/dynamic.py quality --name books-llama
    python evals/dynamic.py quality --model FOLDER --calibration train.txt --text test.txt --name NAME
    python evals/dynamic.py speed --name cpu

Quality: thresholds are calibrated on one text and everything is measured on another; `depth` is the mean share of
blocks that ran there, `active` the mean share of inputs that were computed with. Dropping whole blocks for every token
(the `depth` pass) stands beside it at the same share.
Speed: decoding one text with random weights of the 110 M shape, thresholds calibrated to the shares in the table; the
shares that the timed decode really had are in the results. Writes evals/results/dynamic-NAME.json or
evals/results/dynamic-speed-NAME.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from speed import CLOCKS, SHAPES, llama
from transformers import PreTrainedModel
from trial import Setting, Trial, run_trial

from llmcompress.calibration.context import RunContext
from llmcompress.evaluation.device.speed import compare_speed
from llmcompress.evaluation.environment import machine, versions
from llmcompress.evaluation.perplexity import perplexity
from llmcompress.model.probe import map_model
from llmcompress.model.skeleton import find_blocks
from llmcompress.modules.dynamic import DynamicBlock, tallied
from llmcompress.passes.apply import apply_passes
from llmcompress.progress import Silent
from llmcompress.recipe import parse_recipe
from llmcompress.runners.torch_runner import TorchRunner

QUALITY = {
    "dense": "",
    **{f"early_exit, agreement {a}": f"- early_exit: {{agreement: {a}}}" for a in (0.99, 0.95, 0.9)},
    **{f"early_exit, depth {d}": f"- early_exit: {{depth: {d}}}" for d in (0.9, 0.8)},
    **{
        f"early_exit by {confidence}{', no jump' * (not jump)}, depth 0.8": "- early_exit: "
        f"{{depth: 0.8, confidence: {confidence}, jump: {str(jump).lower()}}}"
        for confidence, jump in (("divergence", False), ("probability", True), ("probability", False))
    },
    **{f"layer_skip {s}": f"- layer_skip: {{skip: {s}}}" for s in (0.05, 0.1, 0.2)},
    "depth 0.2 (static)": "- depth: {fraction: 0.2}",
    **{f"activation_sparsity, ffn {s}": f"- activation_sparsity: {{sparsity: {s}}}" for s in (0.3, 0.5, 0.7)},
    **{
        f"activation_sparsity, all {s}": f"- activation_sparsity: {{sparsity: {s}, inputs: all}}"
        for s in (0.3, 0.4, 0.5)
    },
}
SPEED = {
    "early_exit, depth 0.75": "- early_exit: {depth: 0.75}",
    "layer_skip 0.25": "- layer_skip: {skip: 0.25}",
    **{
        f"activation_sparsity, {where} {s}": f"- activation_sparsity: {{sparsity: {s}, inputs: {where}}}"
        for where in ("ffn", "all")
        for s in (0.5, 0.7, 0.9)
    },
}


@click.group()
def main() -> None:
    """Quality on trained models, or speed on random weights."""


@main.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True, help="measured text, held out")
@click.option("--name", required=True, help="of the result file")
@click.option("--samples", default=64, show_default=True)
@click.option("--max-windows", default=60, show_default=True)
def quality(model: str, calibration: str, text: str, name: str, samples: int, max_windows: int) -> None:
    """Perplexity and shares on held-out text."""
    torch.set_num_threads(1)
    setting = Setting(model, calibration, text, samples=samples, max_windows=max_windows)
    rows = []
    blocks = 0
    for method, passes in QUALITY.items():
        trial = run_trial(setting, passes)
        blocks = blocks or len(find_blocks(trial.model))  # of the dense model, which comes first
        ran = shares_on_text(trial, setting, blocks)
        rows.append({"method": method, "perplexity": trial.perplexity.perplexity, **ran})
        click.echo(str(rows[-1]), err=True)
    facts = {
        "model": name,
        "calibration": Path(calibration).name,
        "text": Path(text).name,
        "samples": samples,
        "tokens": setting.tokens,
        "window": setting.window,
        "measured_tokens": trial.perplexity.tokens,
        "rows": rows,
    }
    write(f"dynamic-{name}", facts)


def shares_on_text(trial: Trial, setting: Setting, blocks: int) -> dict[str, float]:
    """What ran on the first windows of the measured text."""
    task = setting.task.model_copy(update={"max_windows": 10})
    with tallied(trial.model) as counts:
        perplexity(trial.model, trial.tokenizer, task, device=torch.device("cpu"), progress=Silent())
    return shares(trial.model, {key: count.share for key, count in counts.items()}, blocks)


def shares(model: PreTrainedModel, active: dict[str, float], blocks: int) -> dict[str, float]:
    """Mean share of the dense model's blocks that ran, and of inputs that thresholded linears computed with."""
    names = [name for name, _ in find_blocks(model)]
    inputs = [share for name, share in active.items() if name not in names]
    found = {"depth": round(sum(active.get(name, 1.0) for name in names) / blocks, 4)}
    return found | ({"active": round(sum(inputs) / len(inputs), 4)} if inputs else {})


@main.command()
@click.option("--name", required=True, help="of the result file")
@click.option("--clock", type=click.Choice(list(CLOCKS)), default="cpu", show_default=True, help="cpu: processor time")
@click.option("--new-tokens", default=16, show_default=True)
@click.option("--repeats", default=7, show_default=True)
def speed(name: str, clock: str, new_tokens: int, repeats: int) -> None:
    """Decode and prefill against dense, in turns."""
    torch.set_num_threads(1)
    dense = llama(**SHAPES["m110"])
    prompt_1T = torch.randint(32000, (1, 128), generator=torch.Generator().manual_seed(1))
    rows = []
    for method, passes in SPEED.items():
        models = {"dense": dense, method: made_dynamic(passes)}
        with tallied(models[method]) as counts:
            alone = {method: TorchRunner(models[method])}
            compare_speed(alone, {method: prompt_1T[:, -1:]}, new_tokens=2 * new_tokens, repeats=1)
        results = compare_speed(
            {name: TorchRunner(each) for name, each in models.items()},
            dict.fromkeys(models, prompt_1T),
            new_tokens=new_tokens,
            repeats=repeats,
            clock=CLOCKS[clock],
        )
        one, two = results["dense"], results[method]
        rows.append(
            {
                "method": method,
                **shares(
                    models[method],
                    {key: count.share for key, count in counts.items()},
                    SHAPES["m110"]["num_hidden_layers"],
                ),
                "decode_ratio": round(two.decode.median / one.decode.median, 3),
                "decode_spread": round(two.decode.spread, 3),
                "prefill_ratio": round(two.prefill.median / one.prefill.median, 3),
                "dense_decode": round(one.decode.median, 2),
            }
        )
        click.echo(str(rows[-1]), err=True)
    write(f"dynamic-speed-{name}", {"name": name, "shape": "m110", "clock": clock, "threads": 1, "rows": rows})


def made_dynamic(passes: str) -> PreTrainedModel:
    """The 110 M shape with thresholds calibrated on random tokens."""
    model = llama(**SHAPES["m110"])
    windows_NT = torch.randint(32000, (8, 128), generator=torch.Generator().manual_seed(0))
    found = apply_passes(
        model,
        map_model(model),
        parse_recipe("passes:\n" + passes, "evals").passes,
        RunContext(windows_NT, batch=2),
    ).model
    assert any(isinstance(part, DynamicBlock) or hasattr(part, "columns_IO") for part in found.modules())
    return found


def write(name: str, facts: dict[str, Any]) -> None:
    """One result file, with versions and machine."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    facts |= {"versions": versions(), "machine": machine()}
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(str(path))


if __name__ == "__main__":
    main()
