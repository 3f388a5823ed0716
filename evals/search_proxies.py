"""How well cheap numbers order plans: rank correlations (Kendall's τ) of every proxy with what it stands for.

    OMP_NUM_THREADS=1 python evals/search_proxies.py --calibration train.txt --judge valid.txt --text test.txt

Levels, healing and trainings read the first text, judges the second, and "in full" is measured on the third; nothing is
chosen by any of them. Windows of 256 tokens with BOS. Every number is kept when it is measured: a stopped program goes
on.

stages       the same plans on fewer tokens, against another text
predictors   held-out plans, all over the space and at one size, from nothing, from an estimate, from dense plans (APQ)
recovery     plans as they are, healed block by block, after 5 % of a distillation: against the whole distillation;
             and the law of the tokens that healing takes
supernet     sub-networks of one training against each distilled by itself
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from search_laboratory import SPACE, WINDOW, Laboratory

from llmcompress.evaluation.environment import machine, versions
from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.plan_space import Plan
from llmcompress.plan_search.proxies.base import ChangedJudge, Judge, StreamedJudge
from llmcompress.plan_search.proxies.correlation import rank_correlation
from llmcompress.plan_search.proxies.flash import AppliedPasses, shortened
from llmcompress.plan_search.proxies.healing import Healing, HealingSettings
from llmcompress.plan_search.proxies.predictors.base import PREDICTORS, PlanForecast, fit_plans
from llmcompress.plan_search.proxies.scaling_law import fit_scaling_law
from llmcompress.plan_search.proxies.single_options import kl_sensitivity
from llmcompress.plan_search.proxies.supernet.elastic import ElasticSettings, SupernetJudge, trained_supernet
from llmcompress.recipe import parse_recipe
from llmcompress.training.settings import Training

EVALS = Path(__file__).resolve().parent
TRAINING = {"steps": 80, "batch": 2, "learning_rate": 5e-4, "save_every": 10**6}
"""2 × 256 tokens in every step."""
FLASH = 0.05


class Results:
    """The result file, written after every number."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        same = all(known.get(key) == value for key, value in facts.items())
        self._path, self.data = path, known if same else {**facts, "machine": machine(), "versions": versions()}

    def losses(self, name: str, judge: Callable[[], Judge], plans: Sequence[Plan], tokens: int) -> list[float]:
        """Of these plans, each judged once."""
        kept = self.data.setdefault("losses", {}).setdefault(name, {})
        seconds = self.data.setdefault("seconds_per_plan", {})
        todo = [plan for plan in plans if key(plan) not in kept]
        if todo:
            found, began = judge(), time.process_time()
            for number, plan in enumerate(todo, 1):
                kept[key(plan)] = round(found.loss(plan, tokens), 6)
                seconds[name] = round((time.process_time() - began) / number, 3)
                if number % 20 == 0 or seconds[name] > 2:
                    self.save()
                    click.echo(f"{name}: {number} of {len(todo)}, {seconds[name]} s each")
        return [kept[key(plan)] for plan in plans]

    def tell(self, table: str, row: str, one: Sequence[float], other: Sequence[float]) -> None:
        """A rank correlation."""
        found = rank_correlation(one, other)
        self.data.setdefault(table, {})[row] = {name: round(value, 4) for name, value in asdict(found).items()}
        click.echo(f"{table}, {row}: τ {found.tau:.3f} ± {found.error:.3f} on {found.count} plans")
        self.save()

    def save(self) -> None:
        """Write the file."""
        text = json.dumps(self.data, indent=1, ensure_ascii=False)
        self._path.write_text(text + "\n", encoding="utf-8")


def key(plan: Plan) -> str:
    """A plan in a few characters."""
    return "".join(map(str, plan))


def stages(lab: Laboratory, results: Results) -> None:
    """Few tokens against many, and one text against another."""
    plans = lab.of_one_size(30, seed=7)
    judge_NT, text_NT = lab.windows("judge", 64), lab.windows("text", 64)
    full = results.losses("as it is, text", lambda: StreamedJudge(lab.bench, text_NT), plans, 64 * WINDOW)
    for count in (2, 8, 32):
        name = f"as it is, {count * WINDOW} tokens"
        few = results.losses(name, lambda: StreamedJudge(lab.bench, judge_NT), plans, count * WINDOW)
        results.tell("stages", f"{count * WINDOW} tokens", few, full)


def predictors(lab: Laboratory, results: Results) -> None:
    """Plans that a predictor has not seen; it learns from ever more plans."""
    windows_NT, tokens = lab.windows("judge", 64), 8 * WINDOW

    def judged(plans: Sequence[Plan]) -> list[float]:
        return results.losses(f"as it is, {tokens} tokens", lambda: StreamedJudge(lab.bench, windows_NT), plans, tokens)

    pool = lab.compressed(160, seed=1)
    tests = {"all over the space": lab.compressed(60, seed=2), "of one size": lab.of_one_size(60, seed=7)}
    pool = [plan for plan in pool if not any(plan in plans for plans in tests.values())]
    dense = list(dict.fromkeys(map(lab.dense_linears, lab.compressed(80, seed=3))))
    truth = {name: judged(plans) for name, plans in tests.items()}
    known, of_dense = judged(pool), judged(dense)
    around = lab.space.uniform("int3")
    single = results.data.get("sensitivity")
    if single is None:
        results.data["sensitivity"] = single = _written(
            kl_sensitivity(StreamedJudge(lab.bench, windows_NT), lab.space, tokens, around=around)
        )
    estimates = {"gradient × error": lab.estimate, "KL of single options": _read(single)}
    for name, plans in tests.items():
        for title, estimate in estimates.items():
            totals = [estimate.total(lab.space, plan) for plan in plans]
            results.tell("predictors", f"{title}, {name}", totals, truth[name])
    for kind in PREDICTORS:
        predictor = PREDICTORS[kind]()
        for count in (20, 40, 80, len(pool)):
            starts: dict[str, Additive | PlanForecast | None] = {
                "nothing": None,
                "dense plans": fit_plans(predictor, lab.space, dense, of_dense),
                "gradient × error": estimates["gradient × error"],
                "KL of single options": estimates["KL of single options"],
            }
            for title, start in starts.items():
                learned = fit_plans(predictor, lab.space, pool[:count], known[:count], start=start)
                for name, plans in tests.items():
                    row = f"{kind}, {count} plans, from {title}, {name}"
                    results.tell("predictors", row, learned.losses(plans).tolist(), truth[name])


def recovery(lab: Laboratory, results: Results, count: int) -> None:
    """Healed, and distilled for a while, against the whole distillation."""
    for kind, plans, train in (
        ("shapes", [lab.dense_linears(plan) for plan in _of_different_shapes(lab, count)], "weights"),
        ("joint", _of_different_shapes(lab, count), "norms_and_scales"),
        ("one size", lab.of_one_size(count, seed=11), "norms_and_scales"),
    ):
        distilled = _recovery_judges(lab, train)
        full = results.losses(f"{kind}: distilled", distilled["in full"], plans, 64 * WINDOW)
        for name in ("as it is", "healed", "flash"):
            text = distilled[name]
            cheap = results.losses(f"{kind}: {name}", text, plans, 16 * WINDOW)
            results.tell("recovery", f"{kind}: {name}", cheap, full)


def scaling(lab: Laboratory, results: Results) -> None:
    """The law of shorter trainings tells what longer ones give."""
    text_NT = lab.windows("text", 64)
    found = results.data.setdefault("scaling", {})
    for number, plan in enumerate(_of_different_shapes(lab, 2)):
        points = {}
        for steps in (6, 12, 24, 48, 120):
            passes = _distill("weights", steps=steps)
            change = AppliedPasses(passes, lab.whole.context)
            (points[steps],) = results.losses(
                f"shapes: {steps} steps",
                lambda change=change: ChangedJudge(lab.bench, text_NT, [change]),
                [lab.dense_linears(plan)],
                64 * WINDOW,
            )
        short = [steps for steps in points if steps <= 48]
        law = fit_scaling_law([steps * 2 * WINDOW for steps in short], [points[steps] for steps in short])
        expected = {steps: round(law.loss(steps * 2 * WINDOW), 5) for steps in points}
        found[f"plan {number}"] = {"law": asdict(law), "measured": points, "expected": expected}
        click.echo(f"scaling: {found[f'plan {number}']}")
        results.save()


def supernet(lab: Laboratory, results: Results, count: int) -> None:
    """Sub-networks of one training against each shape distilled by itself."""
    plans = [lab.dense_linears(plan) for plan in _of_different_shapes(lab, count)]
    full = results.losses("shapes: distilled", _recovery_judges(lab, "weights")["in full"], plans, 64 * WINDOW)
    judge_NT = lab.windows("judge", 16)

    def judge() -> Judge:
        training = Training(**{**TRAINING, "steps": 25, "learning_rate": 2e-4})
        trained = trained_supernet(lab.whole, lab.space, ElasticSettings(training=training))
        return SupernetJudge(lab.bench, judge_NT, trained, lab.space)

    found = results.losses("shapes: supernet", judge, plans, 16 * WINDOW)
    results.tell("recovery", "shapes: supernet", found, full)


def _of_different_shapes(lab: Laboratory, count: int) -> list[Plan]:
    found: dict[Plan, Plan] = {}
    for plan in lab.compressed(10 * count, seed=5):
        found.setdefault(lab.dense_linears(plan), plan)
    return list(found.values())[:count]


def _distill(train: str, **changes: Any) -> Any:
    text = json.dumps([{"distill": {"train": train, "training": {**TRAINING, **changes}}}])
    return parse_recipe(f"passes: {text}", "recovery").passes


def _recovery_judges(lab: Laboratory, train: str) -> dict[str, Callable[[], Judge]]:
    passes, context = _distill(train), lab.whole.context
    judge_NT, text_NT = lab.windows("judge", 16), lab.windows("text", 64)
    few = replace(context, windows_NT=context.windows_NT[:16])
    healing = Healing(lab.whole.within(few), lab.space, HealingSettings())
    return {
        "as it is": lambda: StreamedJudge(lab.bench, judge_NT),
        "healed": lambda: ChangedJudge(lab.bench, judge_NT, [healing]),
        "flash": lambda: ChangedJudge(lab.bench, judge_NT, [AppliedPasses(shortened(passes, FLASH), context)]),
        "in full": lambda: ChangedJudge(lab.bench, text_NT, [AppliedPasses(passes, context)]),
    }


def _written(losses: Additive) -> dict[str, Any]:
    units = {str(index): found.round(6).tolist() for index, found in losses.of_unit.items()}
    sites = {str(index): found.round(6).tolist() for index, found in losses.of_sites.items()}
    return {"base": losses.base, "units": units, "sites": sites}


def _read(data: dict[str, Any]) -> Additive:
    units = {int(index): np.array(found) for index, found in data["units"].items()}
    return Additive(data["base"], units, {int(index): np.array(found) for index, found in data["sites"].items()})


@click.command()
@click.option("--model", default="builtin:books-llama", show_default=True)
@click.option("--name", default="books-llama", show_default=True, help="of the result")
@click.option("--calibration", required=True, help="text of levels, healing and trainings")
@click.option("--judge", required=True, help="text of proxies")
@click.option("--text", required=True, help="text of what they stand for")
@click.option("--levels", type=click.Path(path_type=Path), required=True, help="folder of the levels")
@click.option("--candidates", default=8, show_default=True, help="plans that are trained in full")
@click.option("--part", multiple=True, default=("stages", "predictors", "recovery", "scaling", "supernet"))
def main(
    model: str, name: str, calibration: str, judge: str, text: str, levels: Path, candidates: int, part: tuple[str, ...]
) -> None:
    """Measure the numbers that are not there yet."""
    torch.manual_seed(0)
    texts = {"calibration": calibration, "judge": judge, "text": text}
    lab = Laboratory(model, texts, levels)
    facts = {"model": model, "window": WINDOW, "training": TRAINING, "flash": FLASH, "space": SPACE}
    facts["texts"] = {role: "/".join(Path(source).parts[-2:]) for role, source in texts.items()}
    results = Results(EVALS / "results" / f"search-proxies-{name}.json", facts)
    if "supernet" in part:  # its training moves the model, which a bench keeps where it is
        supernet(lab, results, candidates)
    for title, measure in {"stages": stages, "predictors": predictors, "scaling": scaling}.items():
        if title in part:
            measure(lab, results)
    if "recovery" in part:
        recovery(lab, results, candidates)
    results.save()


if __name__ == "__main__":
    main()
