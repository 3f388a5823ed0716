"""All optimizers on the table of a small space: regret by forward tokens spent, over seeds.

    OMP_NUM_THREADS=1 python evals/optimizers.py --seeds 20

Regret: log of the best loss found within the limits ÷ the least in the table. Tokens count by what a real search pays:
a plan judged costs its text once; a gradient costs four forward passes of it (forward, again on the way back, and two
for the gradient) for every body that has a share; the estimate of losses that `exact` goes by costs four once.
Reads evals/results/search-table-NAME.npz, writes evals/results/optimizers-NAME.json; `optimizers_plot.py` draws it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from llmcompress.plan_search.optimizers.base import OPTIMIZERS, AskTell
from llmcompress.plan_search.problem import Problem, Relaxation
from llmcompress.plan_search.tabular import Table

HERE = Path(__file__).resolve().parent
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {}),
    "uniform": ("uniform", {}),
    "aging evolution": ("aging_evolution", {}),
    "EvoPress-like": ("evopress", {}),
    "RCO-like": ("rco", {"steps": 20, "samples": 1}),
    "DARTS-like": ("darts", {"steps": 10}),
    "DARTS-like, min-norm": ("darts", {"steps": 10, "combine": "min_norm"}),
    "policy gradient": ("policy_gradient", {}),
    "TPE": ("tpe", {}),
    "NSGA-II": ("nsga2", {}),
    "NSGA-III": ("nsga3", {}),
    "BANANAS-like": ("bananas", {}),
    "APQ-like": ("apq", {}),
    "exact on estimates": ("exact", {}),
    "transformations": ("transformations", {}),
    "shells": ("shells", {}),
    "Gaussian process": ("gp", {}),
}
"""Name in the figure → optimizer and options that are not its defaults: methods that follow gradients get steps that
take 80 of the 100 evaluations' worth of tokens."""
SLOW = {"gp": 40}
"""Trials of those that take long to think."""
SHARES = (0.35, 0.5)
"""Limits of bytes: this far from the smallest plan to the largest."""
BUDGETS = (10, 20, 50, 100)
"""Evaluations of one plan, in forward tokens, at which regret is reported."""
TRIALS = 100
GRADIENT = 4
"""Forward passes that one gradient costs, for each body that has a share."""


class Counting(Relaxation):
    """A relaxation that counts what it would cost, in evaluations of one plan."""

    def __init__(self, inner: Relaxation, problem: Problem) -> None:
        self.tokens, self.spent, self._inner = inner.tokens, 0.0, inner
        self._bodies = [(body, len(problem.space.space.bodies)) for body in problem.space.bodies]

    def loss_and_gradient(self, mixture: Sequence[np.ndarray], step: int) -> tuple[float, list[np.ndarray]]:
        """The inner one's."""
        shared = [int(np.count_nonzero(mixture[body][:bodies])) for body, bodies in self._bodies]
        self.spent += GRADIENT * float(np.mean(shared))
        return self._inner.loss_and_gradient(mixture, step)


@click.command()
@click.option("--name", default="books-llama", show_default=True, help="of the table and of the result file")
@click.option("--seeds", default=20, show_default=True)
@click.option("--only", multiple=True, help="names; the others stay as they are in the result file")
def main(name: str, seeds: int, only: tuple[str, ...]) -> None:
    """Run every optimizer at every limit with every seed."""
    table = Table.read(HERE / "results" / f"search-table-{name}.npz")
    out = HERE / "results" / f"optimizers-{name}.json"
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"] if only and out.exists() else []
    cases = [case_of(table, share) for share in SHARES]
    for label in only or SETTINGS:
        began = time.process_time()
        curves = [regrets(table, label, case, seed) for case in cases for seed in range(seeds)]
        rows = [row for row in rows if row["optimizer"] != label]
        rows.append({"optimizer": label, "seconds": round(time.process_time() - began, 1), **summary(curves)})
        found = rows[-1]["regret"]
        click.echo(f"{label:24s} {rows[-1]['seconds']:7.1f} s  {found}", err=True)
        facts = {"seeds": seeds, "shares": SHARES, "budgets": BUDGETS, "plans": len(table.plans_PU), **table.facts}
        out.write_text(json.dumps({"protocol": facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


class Case(NamedTuple):
    """One limit, and the least loss within it."""

    limits: dict[str, float]
    least: float


def case_of(table: Table, share: float) -> Case:
    """Bytes between the smallest and the largest plan."""
    found = [table.costs["bytes"].total(table.space, tuple(plan)) for plan in table.plans_PU.tolist()]
    limits = {"bytes": min(found) + share * (max(found) - min(found))}
    return Case(limits, table.least(limits, table.stages[-1]).loss)


def regrets(table: Table, label: str, case: Case, seed: int) -> list[float]:
    """Regret after 1, 2, … TRIALS evaluations' worth of tokens; infinite while no plan within the limits was judged."""
    task = table.problem(case.limits)
    assert task.relaxation is not None
    counting = Counting(task.relaxation, task)
    task = replace(task, relaxation=counting)
    kind, options = SETTINGS[label]
    optimizer = OPTIMIZERS[kind].model_validate({"trials": SLOW.get(kind, TRIALS), **options})
    asking, best, spent = AskTell(optimizer, task, seed=seed), math.inf, GRADIENT if kind == "exact" else 0.0
    found = [math.inf] * TRIALS
    while spent + counting.spent < TRIALS and (asked := asking.ask()):
        told = [table.judge(each) for each in asked]
        for outcome in told:
            spent += outcome.tokens / table.stages[-1]
            if task.fits(outcome.plan):
                best = min(best, outcome.loss)
            place = math.ceil(spent + counting.spent) - 1
            if place < TRIALS:
                found[place] = min(found[place], math.log(best / case.least))
        asking.tell(told)
    return np.minimum.accumulate(found).tolist()


def summary(curves: Sequence[Sequence[float]]) -> Mapping[str, Any]:
    """Mean regret with its standard error, and how often the optimum was found, over all limits and seeds."""
    values = np.array(curves)
    values[np.isinf(values)] = np.nan
    at = {str(budget): values[:, budget - 1] for budget in BUDGETS}
    regret = {
        budget: [round(float(found.mean()), 4), round(float(found.std(ddof=1) / math.sqrt(len(found))), 4)]
        if not np.isnan(found).any()
        else None
        for budget, found in at.items()
    }
    optimum = {budget: round(float((found < 1e-9).mean()), 3) for budget, found in at.items()}
    curve = [round(float(column.mean()), 4) if not np.isnan(column).any() else None for column in values.T]
    error = [
        round(float(column.std(ddof=1) / math.sqrt(len(column))), 4) if not np.isnan(column).any() else None
        for column in values.T
    ]
    return {"regret": regret, "optimum": optimum, "curve": curve, "error": error}


if __name__ == "__main__":
    main()
