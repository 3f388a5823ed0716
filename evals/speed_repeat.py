"""Whether `llmcompress speed` says the same twice: two runs in processes of their own, medians compared.

    python evals/speed_repeat.py --name cpu
    python evals/speed_repeat.py --name busy --clock processor --threads 1

The claim is of an idle machine: medians agree within 5 %. How idle it was is measured before each run and stored with
the result; the exit code is 1 where an idle machine does not agree with itself. Writes
evals/results/repeat-speed-NAME.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import psutil

CLAIM = 0.05
"""Largest difference of two medians on an idle machine."""
IDLE = 0.05
"""Share of all cores that others may use on a machine that is called idle."""
WATCHED_SECONDS = 3.0


@click.command()
@click.option("--name", required=True, help="of the result file")
@click.option("--model", "models", multiple=True, default=("builtin:books-llama",), show_default=True)
@click.option("--clock", type=click.Choice(["wall", "processor"]), default="wall", show_default=True)
@click.option("--threads", type=int, help="of torch; processor time wants 1")
@click.option("--repeats", default=15, show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--once", is_flag=True, hidden=True, help="one run, as JSON")
def main(
    name: str, models: tuple[str, ...], clock: str, threads: int | None, repeats: int, new_tokens: int, once: bool
) -> None:
    """Two runs, and how far their medians are apart."""
    if once:
        click.echo(json.dumps(one_run(models, clock, threads, repeats, new_tokens)))
        return
    from llmcompress.evaluation.environment import machine, versions

    runs, others = [], []
    for _ in range(2):
        others.append(round(psutil.cpu_percent(WATCHED_SECONDS) / 100, 3))
        done = subprocess.run([sys.executable, *sys.argv, "--once"], check=True, stdout=subprocess.PIPE, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    rows = compared(*runs)
    idle = max(others) <= IDLE
    worst = max(row["difference"] for row in rows)
    facts = {
        "name": name,
        "clock": clock,
        "repeats": repeats,
        "new_tokens": new_tokens,
        "used_by_others": others,
        "idle": idle,
        "claim": CLAIM,
        "holds": worst <= CLAIM if idle else None,
        "rows": rows,
        "versions": versions(),
        "machine": machine(),
    }
    path = Path(__file__).parent / "results" / f"repeat-speed-{name}.json"
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    click.echo(f"{path}: {'idle' if idle else 'not idle'}, medians differ by up to {worst:.1%}")
    sys.exit(1 if idle and worst > CLAIM else 0)


def one_run(
    models: tuple[str, ...], clock: Any, threads: int | None, repeats: int, new_tokens: int
) -> list[dict[str, Any]]:
    """Medians and spreads of every model."""
    import torch

    from llmcompress.evaluation.device.cost import Candidate, CostSettings, measure_costs

    settings = CostSettings(
        new_tokens=new_tokens, repeats=repeats, threads=threads, clock=clock, skip=("memory", "energy", "limits")
    )
    table = measure_costs({model: Candidate(model) for model in models}, device=torch.device("cpu"), settings=settings)
    return [
        {
            "model": Path(row.model).name,
            "phase": phase,
            "threads": row.threads,
            "cores": row.cores,
            "median": round(rate.median, 3),
            "spread": round(rate.spread, 4),
        }
        for row in table.rows
        for phase, rate in (("prefill", row.speed.prefill), ("decode", row.speed.decode))
    ]


def compared(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By model and phase: |difference| of the medians ÷ the smaller one."""
    return [
        {
            **{key: one[key] for key in ("model", "phase", "threads", "cores")},
            "medians": [one["median"], two["median"]],
            "spreads": [one["spread"], two["spread"]],
            "difference": round(abs(one["median"] - two["median"]) / min(one["median"], two["median"]), 4),
        }
        for one, two in zip(first, second, strict=True)
    ]


if __name__ == "__main__":
    main()
