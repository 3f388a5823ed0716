"""Width pruning: every score, with and without a refit, at equal parameters; perplexity on text none of them saw.

    python evals/width.py --name books-llama
    python evals/width.py --model FOLDER --calibration train.txt --text test.txt --name NAME

Calibration and measured text must differ; nothing is tuned on the measured text. Writes evals/results/width-NAME.json.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import click
from trial import Setting, run_trial

from llmcompress.evaluation.environment import machine, versions

DATA_FREE = ("l1", "l2")
SCORES = (
    "random",
    *DATA_FREE,
    "activation",
    "fluctuation",
    "lasso",
    "taylor_vector",
    "taylor_first",
    "taylor_second",
    "taylor_mix",
    "fisher",
    "group_fisher",
    "uniqueness",
)
REFITS = ("none", "columns")

VARIANTS = {
    "bonsai": "- bonsai: {{ratio: {ratio}, refit: {refit}, prior: activation, masks: 100, windows: 16}}",
    **{score: f"- width: {{{{ratio: {{ratio}}, refit: {{refit}}, score: {score}}}}}" for score in SCORES},
    **{
        f"{score}, global": f"- width: {{{{ratio: {{ratio}}, refit: {{refit}}, score: {score}, allocation: global}}}}"
        for score in ("fluctuation", "taylor_first", "group_fisher")
    },
}
OTHER_REFITS = (("fluctuation", "bias"), ("fluctuation", "scales"), ("fisher", "scales"))
"""FLAP's own compensation, and Kwon's."""


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--calibration", default="builtin:calibration", show_default=True)
@click.option("--text", default="builtin:evaluation", show_default=True, help="measured text, held out")
@click.option("--name", required=True, help="of the result file and the table row")
@click.option("--ratio", default=0.25, show_default=True, help="of the channels and of the heads")
@click.option("--samples", default=64, show_default=True)
@click.option("--tokens", default=256, show_default=True)
@click.option("--seeds", default=3, show_default=True, help="calibration draws; the table shows mean and range")
@click.option("--only", multiple=True, help="variants to measure again; the others are taken from the result file")
def main(
    model: str,
    calibration: str,
    text: str,
    name: str,
    ratio: float,
    samples: int,
    tokens: int,
    seeds: int,
    only: tuple[str, ...],
) -> None:
    """Measure every variant."""
    setting = Setting(model, calibration, text, samples=samples, tokens=tokens)
    dense = run_trial(setting)
    path = Path(__file__).parent / "results" / f"width-{name}.json"
    wanted = [(variant, refit) for variant in VARIANTS for refit in REFITS] + list(OTHER_REFITS)
    known = {(row["variant"], row["refit"]): row for row in json.loads(path.read_text())["rows"]} if only else {}
    for variant, refit in wanted:
        if only and variant not in only:
            continue
        passes = VARIANTS[variant].format(ratio=ratio, refit=refit)
        found, seconds = [], []
        draws = 1 if variant in DATA_FREE and refit == "none" else seeds
        for seed in range(draws):
            begin = time.process_time()
            trial = run_trial(setting, passes, seed=seed)
            seconds.append(round(time.process_time() - begin, 1))
            found.append(trial.perplexity.perplexity)
        known[variant, refit] = {
            "variant": variant,
            "refit": refit,
            "perplexity": found,
            "parameters": trial.parameters,
            "cpu_seconds": seconds,
        }
        click.echo(f"{variant:22s} {refit:8s} {trial.parameters} {statistics.mean(found):.3f} {found}", err=True)
    facts = {
        "model": name,
        "ratio": ratio,
        "calibration": Path(calibration).name,
        "samples": samples,
        "tokens": tokens,
        "dense": dense.perplexity.model_dump() | {"text": Path(text).name, "parameters": dense.parameters},
        "rows": [known[key] for key in wanted if key in known],
        "versions": versions(),
        "machine": machine(),
    }
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(str(path))


if __name__ == "__main__":
    main()
