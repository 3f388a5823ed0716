"""Latency tables of a model's shapes, and whole models against the sums of their parts.

    python evals/latency.py MODEL --runtime torch --out evals/results/latency-NAME.json

Models have random weights: how long they take does not depend on them. A table of another runtime that the file holds
already stays there. Runtimes that need Optimum are measured under transformers 4.57.
"""

from __future__ import annotations

import time
from itertools import zip_longest
from pathlib import Path

import click
import numpy as np
import yaml
from transformers import AutoConfig

from llmcompress.evaluation.device.speed import ClockName
from llmcompress.loading.source import find_source
from llmcompress.model.probe import probe
from llmcompress.plan_search.costs.checking import check_sums
from llmcompress.plan_search.costs.latency_table import read_tables, write_tables
from llmcompress.plan_search.costs.learned import corrected
from llmcompress.plan_search.costs.measuring import measure_latency
from llmcompress.plan_search.costs.small_runs import LatencySettings
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.space import Space
from llmcompress.progress import Silent

SCHEMES = ("int8_channel", "int4_g64", "int3_g64", "int2_g64")
BODIES = {"whole": [], "ffn-75": [{"width": {"fraction": 0.25, "heads": False}}]}
RANDOM_PLANS = 4


class Told(Silent):
    """Progress on standard error."""

    def substep(self, text: str, *, done: int = 0, total: int = 0) -> None:
        """What is measured now."""
        click.echo(f"{time.strftime('%H:%M:%S')} {text}", err=True)

    def note(self, text: str) -> None:
        """What was left out."""
        click.echo(f"note: {text}", err=True)


@click.command()
@click.argument("model")
@click.option("--runtime", default="torch", help="The runner.")
@click.option("--out", "output", required=True, type=click.Path(path_type=Path), help="Tables of all runtimes.")
@click.option("--turns", default=5, help="How often everything is measured.")
@click.option("--clock", type=click.Choice(["wall", "processor"]), default="processor", help="What counts.")
@click.option("--schemes", default=",".join(SCHEMES), help="Of codes, besides dense weights.")
@click.option(
    "--space", "file", type=click.Path(exists=True, path_type=Path), help="A space in YAML, in place of these."
)
@click.option("--measure/--no-measure", default=True, help="Otherwise the table that the file holds is checked.")
@click.option("--plans", default=12, help="Whole models that are measured too; 0: none.")
def main(
    model: str,
    runtime: str,
    output: Path,
    turns: int,
    clock: ClockName,
    schemes: str,
    file: Path | None,
    measure: bool,
    plans: int,
) -> None:
    """Measure a table for MODEL, and check it."""
    config = AutoConfig.from_pretrained(find_source(model).folder)
    sites = {"dense": [], **{name: [{"rtn": {"scheme": name}}] for name in schemes.split(",")}}
    given = yaml.safe_load(file.read_text(encoding="utf-8")) if file else {}
    space = PlanSpace(
        Space.model_validate({"sites": sites, "bodies": BODIES, "most_dropped": 0.2, **given}),
        probe(config, unfuse=True),
    )
    settings = LatencySettings(turns=turns, clock=clock, threads=1 if clock == "processor" else None, memory=False)
    known = read_tables(output) if output.exists() else {}
    table = measure_latency(space, config, runtime, settings=settings, progress=Told()) if measure else known[runtime]
    if plans:
        chosen = dict(list(chosen_plans(space).items())[:plans])
        checks = check_sums(space, config, table, list(chosen.items()), settings=settings, progress=Told())
        table = table.model_copy(update={"checks": checks})
        for row in checks:
            errors = row.errors
            click.echo(f"{row.model}: prefill {errors.prefill:+.1%}, decode {errors.decode:+.1%}")
        if len(checks) > 1:  # each is predicted from the others
            learned = corrected(space, table, list(chosen.values()), checks)
            click.echo(f"mean error {learned.error_before}, corrected and left out {learned.error_left_out}")
            click.echo(f"factors {learned.factors}")
    write_tables(output, {**known, runtime: table}.values())


def chosen_plans(space: PlanSpace) -> dict[str, Plan]:
    """Random ones, uniform ones, and narrow ones, by turns."""
    random = np.random.default_rng(0)
    kinds = [
        {f"random {number}": space.random(random) for number in range(RANDOM_PLANS)},
        {name: space.uniform(name) for name in space.space.sites},
        {f"{name}, ffn-75": space.uniform(name, body="ffn-75") for name in space.space.sites},
    ]
    return dict(each for row in zip_longest(*(kind.items() for kind in kinds)) for each in row if each)


if __name__ == "__main__":
    main()
