"""Searches on a real model at equal bytes: families of choices, optimizers per forward token, and what peers choose.

    OMP_NUM_THREADS=1 python evals/search.py --model FOLDER --calibration valid.txt --judge books/valid.txt \\
        --text WikiText-2=test.txt --text books=books/test.txt --store FOLDER --bits AutoScheme=bits.json

All plans are put together from the same levels (gptq, groups of 64; FFN channels; whole blocks), so only the choice
differs. Every search may spend the same forward tokens; a backward pass counts as two of them. Plans are judged by the
KL divergence from the dense model on `--judge`, which is neither calibration nor test text, and reported on the test
texts, paired by window. `--bits`: JSON with the bits of every linear, as the scripts in `peers/` print it, at the bytes
that these bits take. `--remake`: rows that are compressed for real, as the recipe that the plan is, and measured.

Writes evals/results/search-NAME.json after every row, and goes on where it was stopped.
N = windows, T = tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.data import calibration_windows
from llmcompress.calibration.settings import Calibration
from llmcompress.calibration.whole import WholeModel
from llmcompress.evaluation.environment import machine, versions
from llmcompress.known_model import known_model
from llmcompress.loading.load import load_for_compression
from llmcompress.loading.source import find_source
from llmcompress.model.probe import map_model
from llmcompress.plan_search.costs.file_bytes import bytes_of
from llmcompress.plan_search.levels.bench import Bench
from llmcompress.plan_search.levels.build import build_levels
from llmcompress.plan_search.levels.store import LevelStore
from llmcompress.plan_search.optimizers.additive_optimum import least_loss
from llmcompress.plan_search.optimizers.base import OPTIMIZERS, AskTell
from llmcompress.plan_search.plan_recipe import recipe_of
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.problem import Outcome, Problem, Relaxation
from llmcompress.plan_search.space import Space
from llmcompress.progress import Silent

HERE = Path(__file__).resolve().parent
WINDOW = 512
STAGES = (2048, 4096)
TESTED = 10
"""Windows of every test text."""

GROUP = 64
SITES = {f"int{bits}": [{"gptq": {"scheme": f"int{bits}_g{GROUP}", "range": "joint"}}] for bits in (8, 4, 3, 2)}
SETTINGS: dict[str, Any] = {"save": {"format": "llmcompress"}}
JOINT: dict[str, Any] = {
    "per": "site",
    "sites": SITES,
    "bodies": {"whole": [], "ffn-75": [{"width": {"fraction": 0.25, "heads": False, "round_to": GROUP}}]},
    "most_dropped": 0.2,
    "after": {"int8": ["embeddings"]},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bits": {"bodies": {"whole": []}, "most_dropped": 0.0},
    "bits and width": {"most_dropped": 0.0},
    "bits and depth": {"bodies": {"whole": []}},
    "joint": {},
}


@dataclass(frozen=True)
class Row:
    """One search."""

    average: float
    """Bits per weight of all blocks, scales included, that fill the limit of bytes."""
    family: str
    optimizer: str
    from_exact: bool = False
    """Whether it begins at the optimum of the losses that add up."""
    tokens: int | None = None
    """The most that it may take; None: as asked for."""

    @property
    def name(self) -> str:
        """In the results."""
        return f"{self.average} bits / {self.family} / {'exact, then ' * self.from_exact}{self.optimizer}"


ROWS = (
    Row(3.25, "bits", "exact"),
    Row(3.25, "bits", "evopress", from_exact=True),
    Row(2.75, "bits", "exact"),
    *(Row(average, "bits", "exact", tokens=STAGES[0]) for average in (3.5, 3.0, 2.5)),
    *(Row(average, "joint", "exact", tokens=STAGES[0]) for average in (3.25, 2.75, 2.5)),
    Row(3.25, "bits", "rco"),
    Row(3.25, "bits", "evopress"),
    Row(2.5, "joint", "evopress", from_exact=True),
    Row(2.5, "bits", "evopress", from_exact=True),
    Row(3.25, "bits", "random"),
)


class Counted(Relaxation):
    """Adds up the tokens of a relaxation: forward once, backward twice."""

    def __init__(self, inner: Relaxation) -> None:
        self._inner, self.tokens, self.spent = inner, inner.tokens, 0

    def loss_and_gradient(self, mixture: Sequence[Any], step: int) -> tuple[float, list[Any]]:
        """As the inner one."""
        self.spent += 3 * self.tokens
        return self._inner.loss_and_gradient(mixture, step)


class Setting:
    """The model, its levels and the texts."""

    def __init__(self, model: Path, calibration: Path, judge: Path, texts: Mapping[str, Path], store: Path) -> None:
        loaded = load_for_compression(find_source(str(model)))
        self.tokenizer, self.known = loaded.tokenizer, known_model(find_source(str(model)))
        self.map = map_model(loaded.model)
        context = RunContext(
            self.windows(calibration, 16), batch=8, storage_dtype=loaded.preflight.storage_dtype, progress=Silent()
        )
        whole = WholeModel(loaded.model, self.map, context)
        self.space = self.family("joint")
        self.store = build_levels(whole, self.space, LevelStore(store))
        self.bench = Bench(whole, self.space, self.store)
        self.relaxed = {name: Bench(whole, self.family(name), self.store) for name in FAMILIES}
        self.judged_NT = self.windows(judge, STAGES[-1] // WINDOW)
        self.tests = {name: self.windows(path, TESTED) for name, path in texts.items()}

    def windows(self, text: Path, count: int) -> Tensor:
        """N×T."""
        settings = Calibration(source=str(text), samples=count, tokens=WINDOW)
        return calibration_windows(settings, self.tokenizer, max_positions=WINDOW, seed=0, progress=Silent()).windows_NT

    def family(self, name: str) -> PlanSpace:
        """The part of the space that a family searches."""
        return PlanSpace(Space.model_validate_json(json.dumps({**JOINT, **FAMILIES[name]})), self.map)

    def limit(self, average: float) -> float:
        """Bytes of a model whose blocks have so many bits per weight, and everything else as in every plan."""
        costs = bytes_of(self.space, self.known, SETTINGS)
        known = {bits: costs.total(self.space, self.space.uniform(f"int{bits}", after="int8")) for bits in (2, 4)}
        slope = (known[4] - known[2]) / 2.0
        return known[2] + slope * (average - (2 + 16 / GROUP))

    def problem(self, family: str, average: float, *, from_exact: bool) -> tuple[Problem, Counted]:
        """What an optimizer sees."""
        space, bench = self.family(family), self.relaxed[family]
        counted = Counted(bench.relaxation(bench.text(self.judged_NT[: STAGES[0] // WINDOW])))
        problem = Problem(
            space=space,
            costs={"bytes": bytes_of(space, self.known, SETTINGS)},
            limits={"bytes": self.limit(average)},
            stages=STAGES,
            losses=self.store.losses(space),
            relaxation=counted,
        )
        if from_exact:
            assert problem.losses is not None
            plan = least_loss(space, problem.losses, problem.costs, problem.limits)
            problem = replace(problem, starts=(plan,) if plan else ())
        return problem, counted

    def judged(self, plan: Plan, tokens: int) -> float:
        """Mean KL on the first windows of the judging text."""
        return float(self.bench.divergences(plan, self.bench.text(self.judged_NT[: tokens // WINDOW])).mean())

    def tested(self, plan: Plan) -> dict[str, list[float]]:
        """KL of every window of the test texts."""
        return {
            name: self.bench.divergences(plan, self.bench.text(windows_NT)).tolist()
            for name, windows_NT in self.tests.items()
        }


def searched(setting: Setting, row: Row, tokens: int) -> dict[str, Any]:
    """One row: the best plan of the last stage within so many tokens, and how the best came down."""
    began, spent = time.process_time(), 0
    problem, counted = setting.problem(row.family, row.average, from_exact=row.from_exact)
    space = problem.space
    asking = AskTell(OPTIMIZERS[row.optimizer].model_validate({"trials": 10_000}), problem, seed=0)
    found: dict[tuple[Plan, int], float] = {}
    curve: list[list[float]] = []
    while spent + counted.spent < tokens and (asked := asking.ask()):
        outcomes = []
        for each in asked:
            plan = setting.space.plan(space.chosen(each.plan))
            if (plan, each.tokens) not in found:
                found[plan, each.tokens] = setting.judged(plan, each.tokens)
                spent += each.tokens
            outcomes.append(Outcome(each.plan, each.tokens, found[plan, each.tokens], problem.cost(each.plan)))
            curve.append([spent + counted.spent, each.tokens, found[plan, each.tokens]])
        asking.tell(outcomes)
    finalists = sorted(
        {plan: loss for (plan, at), loss in found.items() if at == STAGES[0]}.items(), key=lambda x: x[1]
    )
    best = min((plan for plan, _ in finalists[:4]), key=lambda plan: setting.judged(plan, STAGES[-1]))
    return {**described(setting, best), "tokens": spent + counted.spent, "cpu_seconds": time.process_time() - began,
            "curve": curve}  # fmt: skip


def described(setting: Setting, plan: Plan) -> dict[str, Any]:
    """A plan and everything that is measured of it."""
    costs = bytes_of(setting.space, setting.known, SETTINGS)
    return {
        "chosen": setting.space.chosen(plan),
        "bytes": costs.total(setting.space, plan),
        "judged": setting.judged(plan, STAGES[-1]),
        "tested": setting.tested(plan),
    }


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
    tokens: int,
    only: tuple[str, ...],
    remake: tuple[str, ...],
    name: str,
) -> None:
    """Do what is missing."""
    named = {each.partition("=")[0]: Path(each.partition("=")[2]) for each in texts}
    setting, path = Setting(model, calibration, judge, named, store), HERE / "results" / f"search-{name}.json"
    facts = {
        "model": name, "space": JOINT, "window": WINDOW, "stages": STAGES, "tokens": tokens,
        "tests": {title: len(windows_NT) for title, windows_NT in setting.tests.items()},
    }  # fmt: skip
    facts = json.loads(json.dumps(facts))
    told = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}
    if any(told.get(key, value) != value for key, value in facts.items()):
        raise SystemExit(f"{path} was measured otherwise: move it away")
    told |= {**facts, "machine": machine(), "versions": versions()}

    def keep(title: str, row: dict[str, Any]) -> None:
        told["rows"][title] = row
        path.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        means = {text: round(sum(values) / len(values), 4) for text, values in row["tested"].items()}
        click.echo(f"{title}: {row['bytes'] / 1e6:.2f} MB, judged {row['judged']:.4f}, tested {means}", err=True)

    for title in remake:
        keep(title, {**told["rows"][title], "remade": remade(setting, told["rows"][title], model, calibration, named)})
    if remake:
        return
    with setting.bench:
        for bits in (2, 3, 4):
            if (title := f"uniform int{bits}") not in told["rows"]:
                keep(title, described(setting, setting.space.uniform(f"int{bits}", after="int8")))
        for each in given:
            title, _, file = each.partition("=")
            if title not in told["rows"]:
                bits_of = json.loads(Path(file).read_text(encoding="utf-8").splitlines()[-1])["bits"]
                keep(title, described(setting, plan_of_bits(setting, bits_of)))
        for row in ROWS:
            if row.name not in told["rows"] and (not only or any(part in row.name for part in only)):
                keep(row.name, searched(setting, row, row.tokens or tokens))


if __name__ == "__main__":
    main()
