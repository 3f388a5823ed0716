"""What scores at initialisation, tickets, RigL and gates are worth on one small model, each against its control.

    python evals/at_init.py --calibration train.txt --name books-llama
    python evals/at_init.py --calibration train.txt --name books-llama --only gates --only rigl

Trainings are minutes on a CPU, not convergence: every comparison gives both sides the same steps, batches and learning
rates. The text trained on must be long (the bundled one would be learned by heart) and not the measured one.
Writes evals/results/at-init-NAME.json after every row; rows that are in the file already are not measured again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
from torch import nn
from trial import Setting, run_trial

from llmcompress.evaluation.environment import machine, versions
from llmcompress.model.skeleton import find_blocks

SCORES = ("random", "snip", "grasp", "synflow")


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", required=True, help="a long text file to train on")
@click.option("--text", default="builtin:evaluation", show_default=True, help="measured text, held out")
@click.option("--name", required=True, help="of the result file")
@click.option("--only", multiple=True, help="sections: pretrained, fresh, ticket, rigl, gates; default: all")
@click.option("--steps", default=150, show_default=True, help="of every training from fresh weights and every recovery")
@click.option("--windows", default=1200, show_default=True, help="windows of 128 tokens to train on")
@click.option("--max-windows", default=60, show_default=True, help="measured windows of 512 tokens")
@click.option("--seeds", default=1, show_default=True)
def main(
    model: str,
    calibration: str,
    text: str,
    name: str,
    only: tuple[str, ...],
    steps: int,
    windows: int,
    max_windows: int,
    seeds: int,
) -> None:
    """Measure every row of every section."""
    path = Path(__file__).parent / "results" / f"at-init-{name}.json"
    facts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    known = {(row["section"], row["method"]) for row in facts["rows"]}
    for section, method, passes, samples in rows_of(steps, windows):
        if (section, method) in known or (only and section not in only):
            continue
        setting = Setting(model, calibration, text, samples=samples, tokens=128, window=512, max_windows=max_windows)
        trials = [run_trial(setting, passes, seed=seed) for seed in range(seeds)]
        found = [trial.perplexity.perplexity for trial in trials]
        facts["rows"].append(
            {
                "section": section,
                "method": method,
                "perplexity": found,
                "parameters": trials[0].parameters,
                "zeros": zeros_in_blocks(trials[0].model),
                "passes": passes,
            }
        )
        facts |= {
            "model": name,
            "calibration": Path(calibration).name,
            "text": Path(text).name,
            "tokens": 128,
            "steps": steps,
            "windows": windows,
            "window": 512,
            "versions": versions(),
            "machine": machine(),
        }
        path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        click.echo(f"{section:12s} {method:32s} {found}", err=True)
    click.echo(str(path))


def zeros_in_blocks(model: nn.Module) -> float:
    """Share of exact zeros in the matrices of all blocks."""
    weights = [each for _, block in find_blocks(model) for each in block.parameters() if each.dim() > 1]
    return sum(int((each == 0).sum()) for each in weights) / sum(each.numel() for each in weights)


def rows_of(steps: int, windows: int) -> Iterator[tuple[str, str, str, int]]:
    """Section, method, passes, calibration windows."""
    fresh = f"{{steps: {steps}, batch: 8, learning_rate: 0.002}}"
    recover = f"{{steps: {steps}, batch: 8, learning_rate: 0.0005}}"

    yield "pretrained", "dense", "", 64
    for score in ("magnitude", *SCORES):
        yield "pretrained", f"{score} 50 %", f"- {score}: {{sparsity: 0.5}}", 64
    yield "pretrained", "synflow 50 %, layer", "- synflow: {sparsity: 0.5, comparison: layer}", 64

    begin, trained = "- reinitialise: {seed: 0}\n", f"- recover: {{training: {fresh}}}"
    yield "fresh", "dense", begin + trained, windows
    for sparsity in (0.5, 0.9):
        for score in SCORES:
            yield "fresh", f"{score} {sparsity:.0%}", f"{begin}- {score}: {{sparsity: {sparsity}}}\n{trained}", windows

    rounds = f"rounds: 3, share: 0.4, training: {fresh}"
    again = "- reinitialise: {seed: 1, keep_zeros: true}\n"
    yield "ticket", "ticket", f"{begin}- lottery_ticket: {{{rounds}}}", windows
    rewound = f"{begin}- lottery_ticket: {{{rounds}, finish: rewound}}\n"
    yield "ticket", "its zeros, other random weights", rewound + again + trained, windows
    yield "ticket", "random zeros", f"{begin}- random: {{sparsity: {1 - 0.6**3:.3f}}}\n{trained}", windows

    for sparsity in (0.7, 0.9):
        pruned = f"- magnitude: {{sparsity: {sparsity}}}\n"
        yield "rigl", f"magnitude {sparsity:.0%}", pruned, 64
        yield "rigl", f"magnitude {sparsity:.0%}, recover", f"{pruned}- recover: {{training: {recover}}}", windows
        adapters = f"{{rank: 8, training: {recover.replace('0.0005', '0.002')}}}"
        yield "rigl", f"magnitude {sparsity:.0%}, recover rank 8", f"{pruned}- recover: {adapters}", windows
        yield "rigl", f"magnitude {sparsity:.0%}, rigl", f"{pruned}- rigl: {{training: {recover}}}", windows
    start = f"{begin}- random: {{sparsity: 0.9, densities: erk}}\n"
    yield "rigl", "fresh, random 90%, recover", start + trained, windows
    yield "rigl", "fresh, random 90%, rigl", f"{start}- rigl: {{training: {fresh}}}", windows

    # the gates' steps are taken from the recovery, so that all methods train equally long
    half = recover.replace(f"steps: {steps}", f"steps: {steps // 2}")
    for score in ("random", "l2", "taylor_first"):
        cut = f"- width: {{score: {score}, fraction: 0.3333, refit: none}}\n"
        yield "gates", f"width {score}", cut, 64
        yield "gates", f"width {score}, recover", f"{cut}- recover: {{training: {recover}}}", windows
    for kind in ("hard_concrete", "slimming", "group_lasso", "decorator"):
        gates = f"- gates: {{kind: {kind}, fraction: 0.3333, training: {half}}}\n"
        if kind in ("hard_concrete", "slimming"):
            yield "gates", f"gates {kind}", gates, windows
        yield "gates", f"gates {kind}, recover", f"{gates}- recover: {{training: {half}}}", windows
    cut = "- width: {score: taylor_first, fraction: 0.3333, refit: none, allocation: global}\n"
    yield "gates", "width taylor_first, global", cut, 64
    gates = f"- gates: {{kind: dsa, fraction: 0.3333, allocation: global, training: {half}}}\n"
    yield "gates", "gates dsa, global", gates, windows


if __name__ == "__main__":
    main()
