"""Every search file in configs/ runs, on a tiny model with a tiny budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcompress.known_model import KnownModel, known_model
from llmcompress.loading.source import find_source
from llmcompress.plan_search.costs.file_bytes import bytes_of, with_settled_format
from llmcompress.plan_search.opening import check_options
from llmcompress.plan_search.optimizers.additive_optimum import nearest
from llmcompress.plan_search.plan_space import PlanSpace
from llmcompress.plan_search.problem import Problem
from llmcompress.plan_search.searching import search
from llmcompress.plan_search.settings import read_search, search_names
from tests.tiny_folder import write_tiny_llama

TINY = [
    "calibration.samples=2",
    "calibration.tokens=32",
    "judge.stages=[32, 64]",
    "finish={compress: 0, front: 2}",
    "evaluate={}",
    "limits={bytes: 0.95x}",
]
FEWER = {
    "apq": ["optimizer.apq={trials: 6, start: 4, population: 4, generations: 1, batch: 2}"],
    "darts": ["optimizer.darts={trials: 3, steps: 2, judged: 2}"],
    "autodistill": ["optimizer.gp={trials: 4, start: 3}", "judge.flash=0.05"],
    "ofa": ["optimizer.aging_evolution={trials: 6, population: 3, sample: 2}", "judge.supernet.training.steps=1"],
    "mnasnet": [
        "optimizer.policy_gradient={trials: 6, batch: 2}",
        "costs={axes: [bytes, decode], turns: 1, context: 4, threads: 1}",
    ],
    "bananas": ["optimizer.bananas={trials: 6, start: 4, candidates: 4, batch: 2}"],
    "amc": ["optimizer.policy_gradient={trials: 6, batch: 2}"],
    "evopress": ["optimizer.evopress={trials: 6, offspring: 3}"],
    "rco": ["optimizer.rco={trials: 3, steps: 2, samples: 1, judged: 2}"],
    "joint": ["optimizer.exact={trials: 6}"],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return str(write_tiny_llama(folder, hidden_size=32, intermediate_size=128, num_hidden_layers=3))


@pytest.fixture(scope="module")
def bundled() -> KnownModel:
    return known_model(find_source("builtin:books-llama"))


def test_every_search_file_names_its_budget_here() -> None:
    assert set(FEWER) == set(search_names())


@pytest.mark.parametrize("name", FEWER)
def test_every_search_file_runs(name: str, tiny: str, tmp_path: Path) -> None:
    found = search(tiny, read_search(name, settings=[*TINY, *FEWER[name]]), tmp_path / "study")
    assert found.selected is not None and found.front
    assert all(each.problem is None for each in found.trials)


@pytest.mark.parametrize("name", FEWER)
def test_every_search_file_fits_the_bundled_model_and_its_limits_can_be_kept(name: str, bundled: KnownModel) -> None:
    settings = read_search(name).for_model(None)
    space = PlanSpace(settings.space, bundled.map)
    check_options(space, bundled, settings)
    sizes = bytes_of(space, bundled, with_settled_format(space, bundled, settings.recipe_settings()))
    limits = settings.limits.model_copy(update={"decode": None}).values({"bytes": bundled.checked.bytes_weights})
    problem = Problem(space=space, costs={"bytes": sizes}, limits=limits)
    assert problem.fits(nearest(problem))
    assert not problem.fits((0,) * len(space.units)) or not limits, "a limit that everything keeps decides nothing"
