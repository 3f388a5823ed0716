"""What was found, made for real: recipes of the front, and its best plans compressed beside uniform ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcompress.errors import CompressError
from llmcompress.pipeline import compress
from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.baselines import changes_something
from llmcompress.plan_search.ending import Found
from llmcompress.plan_search.plan_recipe import recipe_of
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.problem import Outcome
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.records.report import Report, read_report
from llmcompress.records.search import MadeModel
from llmcompress.storage.atomic import replacing


def recipes_of(found: Found, settings: Mapping[str, Any]) -> dict[int, Recipe]:
    """Trial → recipe, of the front and of uniform plans; a plan that changes nothing has none."""
    wanted = [*found.front, *_uniform(found)]
    space = found.problem.space
    return {
        found.number(each): recipe_of(space, each.plan, settings)
        for each in wanted
        if changes_something(space, each.plan)
    }


def write_recipes(recipes: Mapping[int, Recipe], folder: Path) -> None:
    """One file per trial."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, recipe in recipes.items():
        with replacing(folder / f"{number}.yaml") as part:
            part.write_text(recipe.to_yaml(), encoding="utf-8")


def to_make(found: Found, count: int) -> list[Outcome]:
    """The first `count` of the front, and beside them the uniform plans next to the first in its cost."""
    if not count or found.selected is None:
        return []
    chosen, axis = found.selected, next(iter(found.problem.costs))
    uniform = sorted(_uniform(found), key=lambda each: each.costs[axis])
    below = [each for each in uniform if each.costs[axis] <= chosen.costs[axis]][-1:]
    above = [each for each in uniform if each.costs[axis] > chosen.costs[axis]][:1]
    wanted = [*found.ordered[:count], *below, *above]
    plans = {each.plan: each for each in wanted if changes_something(found.problem.space, each.plan)}
    return list(plans.values())


def make_models(
    found: Found,
    recipes: Mapping[int, Recipe],
    outcomes: Sequence[Outcome],
    folder: Path,
    *,
    device: str,
    progress: Progress,
) -> tuple[MadeModel, ...]:
    """Compress each by its recipe into the folder, or find it there; measured as the recipe says."""
    made = []
    for outcome in outcomes:
        number = found.number(outcome)
        recipe, output = recipes[number], folder / str(number)
        report = _finished(output, recipe)
        if report is None:
            report = compress(
                recipe.model, recipe, output, device=device, overwrite=output.exists(), progress=progress
            ).report
        made.append(_made(number, found, outcome, report, output))
    return tuple(each for each in made if each is not None)


def kept_bytes(space: PlanSpace, plan: Plan, sizes: Additive, bits_of_dense: float) -> dict[str, float]:
    """Site → bytes ÷ bytes of the dense linear; linears that are decided together have equal shares."""
    names = [info.name for info in space.model_map.blocks]
    found: dict[str, float] = {}
    for index, unit in enumerate(space.units):
        if unit.body is None:
            continue
        sites = {
            f"{names[block]}.{site.name}": site.outputs * site.inputs
            for block in unit.blocks
            for site in space.model_map.blocks[block].structure.sites
            if site.name in unit.sites
        }
        dropped = space.is_dropped(plan, unit.body)
        taken = 0.0 if dropped else float(sizes.of_sites[index][plan[unit.body], plan[index]])
        share = taken / (sum(sites.values()) * bits_of_dense / 8)
        found |= dict.fromkeys(sites, share)
    return found


def _uniform(found: Found) -> list[Outcome]:
    plans = set(found.uniform.values())
    most = max((each.outcome.tokens for each in found.trials), default=0)
    unique = {each.outcome.plan: each.outcome for each in found.trials if each.outcome.tokens == most}
    return [each for plan, each in unique.items() if plan in plans and each.is_valid]


def _finished(output: Path, recipe: Recipe) -> Report | None:
    """The report of a model that was made by this recipe before."""
    try:
        report = read_report(output)
    except CompressError:
        return None
    return report if report.recipe_hash == recipe.hash() else None


def _made(number: int, found: Found, outcome: Outcome, report: Report, output: Path) -> MadeModel | None:
    """None where the recipe measures no perplexity."""
    if not report.quality:
        return None
    quality = report.quality[0]
    divergence = quality.divergence
    return MadeModel(
        trial=number,
        folder=str(output),
        uniform=found.name_of_uniform(outcome.plan),
        bytes=report.bytes_compressed,
        planned_bytes=outcome.costs.get("bytes"),
        text=quality.compressed.text,
        window=quality.compressed.window,
        bos=quality.compressed.bos,
        perplexity_dense=quality.dense.perplexity,
        perplexity=quality.compressed.perplexity,
        ratio=quality.ratio,
        ratio_error=quality.ratio_error,
        kl=divergence.kl.mean if divergence else None,
        kl_error=divergence.kl.standard_error if divergence else None,
    )
