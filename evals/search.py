"""Searches on a real model at equal bytes and at equal decode latency: families of choices, optimizers by forward
tokens, what peers choose, and pruning first with quantization second.

    OMP_NUM_THREADS=1 python evals/search.py --model FOLDER --calibration valid.txt --judge books/valid.txt \\
        --text WikiText-2=test.txt --text books=books/test.txt --store FOLDER --bits AutoScheme=bits.json \\
        --latency table.json

All plans are put together from the same levels (search_space.yaml), so only the choice differs. A search ends when it
has taken so many forward tokens. Plans are judged by the KL divergence from the dense model on `--judge`, which is
neither calibration nor test text, and reported on the test texts, paired by window. `--bits`: JSON with the bits of
every linear, as the scripts in `peers/` print it, at the bytes that these bits take. `--latency`: seconds of the
space's products in ONNX Runtime, by `scripts/measure_latency.py`; without it, rows with a limit of decoding are left
out. `--remake`: rows that are compressed for real, as the recipe that the plan is, and measured.

Writes evals/results/search-NAME.json after every row, and goes on where it was stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from search_setting import SETTINGS, SPACE, STAGES, TESTED, WINDOW, Counted, Setting

from llmcompress.evaluation.environment import machine, versions
from llmcompress.plan_search.costs.latency_table import LatencyTable
from llmcompress.plan_search.optimizers.additive_optimum import least_loss
from llmcompress.plan_search.optimizers.base import OPTIMIZERS, AskTell
from llmcompress.plan_search.plan_recipe import recipe_of
from llmcompress.plan_search.plan_space import Plan
from llmcompress.plan_search.problem import Outcome, Problem

HERE = Path(__file__).resolve().parent
FULL_SEARCH = 98_304
"""Forward tokens: 48 plans of the first stage."""
PRUNE_FIRST = "prune first"
PRUNED_FIRST = (5, 10, 15, 20, 25, 30)
"""How many blocks lose FFN channels before bits are chosen."""


@dataclass(frozen=True)
class Row:
    """One search."""

    limit: str
    """`3.25 bits`: bytes of so many bits per weight of all blocks, scales included. `decode 0.9`: seconds per token, as
    a part of what uniform 4 bits take."""
    family: str
    optimizer: str
    from_exact: bool = False
    """Whether it begins at the optimum of the losses that add up."""
    tokens: int | None = None
    """The most that it may take; None: as asked for."""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """In the results."""
        return f"{self.limit} / {self.family} / {'exact, then ' * self.from_exact}{self.optimizer}"

    @property
    def of_decoding(self) -> bool:
        """Whether latency is limited."""
        return self.limit.startswith("decode ")

    def limits(self, setting: Setting) -> dict[str, float]:
        """Axis and amount."""
        if self.of_decoding:
            return {"decode": setting.decode_limit(float(self.limit.removeprefix("decode ")))}
        return {"bytes": setting.bytes_limit(float(self.limit.removesuffix(" bits")))}


OPTIMA = 7 * STAGES[0]
"""Tokens for the optima of all families."""
RELAXED = {"steps": 60, "samples": 1}
"""Of `rco`: with its own 4 samples a step, the first gradients alone would take all tokens."""
ROWS = (
    *(Row("3.25 bits", family, "exact") for family in ("bits", "joint")),
    Row("3.25 bits", "bits", "evopress", from_exact=True),
    *(
        Row(f"{average} bits", family, "exact", tokens=len(PRUNED_FIRST) * STAGES[-1])
        for average in (3.5, 3.0, 2.75, 2.5)
        for family in ("bits", "joint")
    ),
    *(
        Row(f"{average} bits", family, "exact", tokens=OPTIMA)
        for average in (2.75, 2.5)
        for family in ("bits and width", "bits and depth")
    ),
    *(Row(f"{average} bits", "bits and width", PRUNE_FIRST) for average in (3.0, 2.75, 2.5)),
    *(
        Row(f"decode {part}", family, "exact", tokens=OPTIMA)
        for part in (0.9, 0.98, 1.1)
        for family in ("bits", "width", "depth", "joint")
    ),
    *(Row(f"decode {part}", "bits and width", PRUNE_FIRST) for part in (0.9, 0.98)),
    Row("2.75 bits", "joint", "random", tokens=100 * STAGES[0]),
    Row("3.25 bits", "bits", "evopress", tokens=FULL_SEARCH),
    Row("3.25 bits", "bits", "rco", tokens=FULL_SEARCH, options=RELAXED),
    Row("2.75 bits", "joint", "evopress"),
)


def problem(setting: Setting, row: Row, relaxation: Counted | None = None) -> Problem:
    """What an optimizer sees."""
    space = setting.family(row.family)
    costs, losses, limits = setting.costs(space), setting.store.losses(space), row.limits(setting)
    starts: list[Plan] = []
    if row.from_exact:
        starts = [start] if (start := least_loss(space, losses, costs, limits)) else []
    elif row.optimizer == "evopress":  # as in its paper: what is uniform within the limits, and what is left spent
        starts = [space.uniform(name, after="int8") for name in space.space.sites]
    return Problem(
        space=space,
        costs=costs,
        limits=limits,
        stages=STAGES,
        losses=losses,
        relaxation=relaxation,
        starts=tuple(starts),
    )


def searched(setting: Setting, row: Row, tokens: int) -> dict[str, Any] | None:
    """One row: the best plan of the last stage within so many tokens, and how the best came down; None: none fits."""
    began, spent = time.process_time(), 0
    counted = setting.relaxation(row.family) if row.optimizer == "rco" else None
    given = problem(setting, row, counted)
    asking = AskTell(OPTIMIZERS[row.optimizer].model_validate({"trials": 10_000, **row.options}), given, seed=0)
    found: dict[tuple[Plan, int], float] = {}
    curve: list[list[float]] = []

    def taken() -> int:
        return spent + (counted.spent if counted else 0)

    while taken() < tokens and (asked := asking.ask()):
        if not all(given.fits(each.plan) for each in asked):
            return None
        outcomes = []
        for each in asked:
            if taken() >= tokens:
                break
            plan = setting.in_space(given.space, each.plan)
            if (plan, each.tokens) not in found:
                found[plan, each.tokens] = setting.judged(plan, each.tokens)
                spent += each.tokens
            outcomes.append(Outcome(each.plan, each.tokens, found[plan, each.tokens], given.cost(each.plan)))
            curve.append([taken(), each.tokens, found[plan, each.tokens]])
        if len(outcomes) < len(asked):
            break
        asking.tell(outcomes)
    if not found:
        return None
    first = sorted((loss, plan) for (plan, at), loss in found.items() if at == STAGES[0])
    best = min((plan for _, plan in first[:4]), key=lambda plan: setting.judged(plan, STAGES[-1]))
    return {**setting.described(best), "tokens": taken(), "cpu_seconds": time.process_time() - began, "curve": curve}


def pruned_first(setting: Setting, row: Row) -> dict[str, Any] | None:
    """The FFNs of some blocks are pruned by what that loses at 8 bits, then bits are chosen within the limit; of all
    numbers of pruned blocks the best by the judging text."""
    began, given = time.process_time(), problem(setting, row)
    space, losses = given.space, given.losses
    assert losses is not None
    lost = {
        body: losses.of_unit[body][1]
        - losses.of_unit[body][0]
        + sum(losses.of_sites[site][1, 0] - losses.of_sites[site][0, 0] for site in space.inside(body))
        for body in space.bodies
    }
    order = sorted(lost, key=lambda body: lost[body])
    judged: dict[Plan, float] = {}
    for count in PRUNED_FIRST:
        pruned = set(order[:count])
        fixed = {body: np.array([math.inf, 0.0] if body in pruned else [0.0, math.inf]) for body in space.bodies}
        plan = least_loss(space, replace(losses, of_unit={**losses.of_unit, **fixed}), given.costs, given.limits)
        if plan is not None:
            found = setting.in_space(space, plan)
            judged[found] = setting.judged(found, STAGES[-1])
    if not judged:
        return None
    best = min(judged, key=lambda plan: judged[plan])
    spent = len(judged) * STAGES[-1]
    return {**setting.described(best), "tokens": spent, "cpu_seconds": time.process_time() - began}


def plan_of_bits(setting: Setting, bits: Mapping[str, int]) -> Plan:
    """The plan in which every linear has these bits."""
    known = {unit.name for unit in setting.space.units}
    chosen = {name: f"int{count}" for name, count in bits.items() if name in known}
    return setting.space.plan({**chosen, "after": "int8"})


def remade(setting: Setting, row: Mapping[str, Any], model: Path, calibration: Path, texts: Mapping[str, Path]) -> Any:
    """The plan as a recipe, compressed for real."""
    from llmcompress import compress

    settings = {
        **SETTINGS,
        "calibration": {"source": str(calibration), "samples": 16, "tokens": WINDOW},
        "evaluate": {
            "perplexity": [
                {"source": str(path), "window": WINDOW, "bos": "always", "max_windows": 10} for path in texts.values()
            ]
        },
    }
    began = time.process_time()
    result = compress(str(model), recipe_of(setting.space, setting.space.plan(row["chosen"]), settings), None)
    quality = dict(zip(texts, result.report.quality, strict=True))
    return {
        "cpu_seconds": time.process_time() - began,
        "perplexity": {name: each.compressed.perplexity for name, each in quality.items()},
        "ratio": {name: each.ratio for name, each in quality.items()},
    }


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--calibration", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--judge", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--text", "texts", multiple=True, required=True, help="NAME=FILE")
@click.option("--store", type=click.Path(path_type=Path), required=True, help="Folder of the levels.")
@click.option("--bits", "given", multiple=True, help="NAME=FILE: bits of every linear, chosen by another tool.")
@click.option("--latency", type=click.Path(path_type=Path, exists=True), help="Table of ONNX Runtime.")
@click.option("--tokens", default=49_152, show_default=True, help="Of each search.")
@click.option("--only", multiple=True, help="A part of the name of rows.")
@click.option("--remake", multiple=True, help="A row that is compressed for real; nothing else is done.")
@click.option("--name", default="SmolLM2-135M-Instruct", show_default=True)
def main(
    model: Path,
    calibration: Path,
    judge: Path,
    texts: tuple[str, ...],
    store: Path,
    given: tuple[str, ...],
    latency: Path | None,
    tokens: int,
    only: tuple[str, ...],
    remake: tuple[str, ...],
    name: str,
) -> None:
    """Do what is missing."""
    named = {each.partition("=")[0]: Path(each.partition("=")[2]) for each in texts}
    table = LatencyTable.read(latency, runtime="onnxruntime") if latency else None
    setting = Setting(model, calibration, judge, named, store=store, latency=table)
    path = HERE / "results" / f"search-{name}.json"
    facts = {
        "model": name, "space": SPACE, "window": WINDOW, "stages": STAGES, "tokens": tokens,
        "tests": dict.fromkeys(named, TESTED),
    }  # fmt: skip
    facts = json.loads(json.dumps(facts))
    told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}
    if any(told.get(key, value) != value for key, value in facts.items()):
        raise SystemExit(f"{path} was measured otherwise: move it away")
    told |= {**facts, "machine": machine(), "versions": versions()}

    def keep(title: str, row: dict[str, Any] | None) -> None:
        told["rows"][title] = row
        path.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if row is None:
            click.echo(f"{title}: no plan fits", err=True)
            return
        means = {text: round(sum(values) / len(values), 4) for text, values in row["tested"].items()}
        click.echo(f"{title}: {row['bytes'] / 1e6:.2f} MB, judged {row['judged']:.4f}, tested {means}", err=True)

    for title in remake:
        keep(title, {**told["rows"][title], "remade": remade(setting, told["rows"][title], model, calibration, named)})
    if remake:
        return
    with setting.bench:
        for bits in (2, 3, 4):
            if (title := f"uniform int{bits}") not in told["rows"]:
                keep(title, setting.described(setting.space.uniform(f"int{bits}", after="int8")))
        for each in given:
            title, _, file = each.partition("=")
            if title not in told["rows"]:
                bits_of = json.loads(Path(file).read_text(encoding="utf-8").splitlines()[-1])["bits"]
                keep(title, setting.described(plan_of_bits(setting, bits_of)))
        for row in ROWS:
            wanted = not only or any(part in row.name for part in only)
            if row.name in told["rows"] or not wanted or (row.of_decoding and table is None):
                continue
            prunes = row.optimizer == PRUNE_FIRST
            keep(row.name, pruned_first(setting, row) if prunes else searched(setting, row, row.tokens or tokens))


if __name__ == "__main__":
    main()
