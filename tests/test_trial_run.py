"""A trial runs the recipe itself on one block of each kind; the model's files stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmcompress.cost import Machine
from llmcompress.known_model import known_model
from llmcompress.loading.source import Source
from llmcompress.model.probe import probe
from llmcompress.pipeline import plan
from llmcompress.planning import fitted_to_model
from llmcompress.recipe import parse_recipe
from llmcompress.recipe.model import Recipe
from llmcompress.trial_run import Bench, at_new_places, blocks_of_each_kind
from tests.tiny_folder import write_tiny_llama

MIXED = "{rtn: {scheme: int8_channel, exclude: '*.layers.[01].*', overrides: {'*.3.*': {scheme: int4_g16}}}}"
"""Two blocks stay dense, and one has another scheme than the rest."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(write_tiny_llama(tmp_path_factory.mktemp("tiny"), num_hidden_layers=6), "tiny")


def recipe(passes: str) -> Recipe:
    calibration = "{source: builtin:calibration, samples: 4, tokens: 32, batch: 2}"
    return parse_recipe(f"calibration: {calibration}\npasses: [{passes}]\nevaluate: {{}}", "test")


class Steady:
    """A clock that is asked twice by every run: the seconds between are what the test says."""

    def __init__(self, *seconds: float) -> None:
        self.times = [time for taken in seconds for time in (0.0, taken)]

    def __call__(self) -> float:
        return self.times.pop(0)


def test_seconds_are_those_of_the_blocks_times_the_operations_of_all(tiny: Source) -> None:
    bench = Bench(tiny, known_model(tiny), torch.device("cpu"), clock=Steady(2.0))
    given = recipe("{gptq: {scheme: int4_g16}}")
    trial = bench.trial(given, bench.windows(given))
    assert trial.blocks == (0,)
    taken = bench.cost(given)
    assert trial.seconds(taken) == pytest.approx(6 * 2.0)  # six blocks alike


def test_with_logits_two_runs_tell_blocks_and_head_apart(tiny: Source) -> None:
    """Two blocks take 2a + h, four take 4a + h, and six take 6a + h."""
    bench = Bench(tiny, known_model(tiny), torch.device("cpu"), clock=Steady(2 * 3 + 5, 4 * 3 + 5))
    given = recipe("{width: {fraction: 0.25, score: taylor_first, refit: none}}")
    trial = bench.trial(given, bench.windows(given))
    assert trial.blocks == (0, 1, 2, 3)
    assert trial.seconds(bench.cost(given)) == pytest.approx(6 * 3 + 5, rel=1e-6)


def test_what_a_pass_on_the_whole_model_takes_is_not_multiplied(tiny: Source) -> None:
    bench = Bench(tiny, known_model(tiny), torch.device("cpu"), clock=Steady(3 + 5, 2 * 3 + 5))
    given = recipe("{rtn: {scheme: int4_g16}}, {embeddings: {}}")
    assert bench.trial(given, None).seconds(bench.cost(given)) == pytest.approx(6 * 3 + 5, rel=1e-6)


def test_blocks_that_the_recipe_treats_differently_are_of_different_kinds(tiny: Source) -> None:
    model_map = known_model(tiny).map
    given = recipe(
        "{rtn: {scheme: int8_channel, exclude: '*.layers.[01].*', overrides: {'*.3.*': {scheme: int4_g16}}}}"
    )
    assert blocks_of_each_kind(given, model_map, 1) == (0, 2, 3)
    assert blocks_of_each_kind(given, model_map, 2) == (0, 1, 2, 3, 4)


def test_at_its_new_place_a_block_is_treated_as_at_its_old_one(tiny: Source) -> None:
    known = known_model(tiny)
    given = fitted_to_model(recipe(MIXED), known.map)
    config = type(known.checked.config).from_dict({**known.checked.config.to_dict(), "num_hidden_layers": 3})
    few = probe(config)
    (rtn,) = at_new_places(given, known.map, few, (0, 2, 3)).passes
    told = {place: (rtn.selects(name), rtn.for_site(name).scheme) for place in range(3)
            for name in [f"model.layers.{place}.mlp.up_proj"]}  # fmt: skip
    assert told == {0: (False, "int8_channel"), 1: (True, "int8_channel"), 2: (True, "int4_g16")}


def test_a_plan_says_which_blocks_were_probed_and_the_files_are_as_they_were(tiny: Source, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in tiny.folder.iterdir()}
    given = recipe("{rtn: {scheme: int4_g16}}")
    machine = Machine(1e9)
    counted = plan(str(tiny.folder), given, machine=machine)
    probed = plan(str(tiny.folder), given, machine=machine, probe_on=torch.device("cpu"))
    assert (counted.probed_blocks, probed.probed_blocks) == ((), (0,))
    same = {"sites", "output_bytes", "operations", "license", "publishes"}
    assert counted.model_dump(include=same) == probed.model_dump(include=same)
    assert {path.name: path.read_bytes() for path in tiny.folder.iterdir()} == before


def test_what_few_blocks_cannot_tell_is_estimated_from_operations_with_the_reason(tiny: Source) -> None:
    given = recipe("{depth: {blocks: [5]}}")
    found = plan(str(tiny.folder), given, machine=Machine(1e9), probe_on=torch.device("cpu"))
    assert found.probed_blocks == () and "estimated from operations" in found.warnings[-1]
