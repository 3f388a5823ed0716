"""A trial runs the recipe itself on one block of each kind; the model's files stay as they are."""

from __future__ import annotations

from itertools import accumulate
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
from llmcompress.trial_run import Bench, Trial, at_new_places, blocks_of_each_kind, kinds_of_blocks
from tests.tiny_folder import write_tiny_llama

MIXED = "{rtn: {scheme: int8_channel, exclude: '*.layers.[01].*', overrides: {'*.3.*': {scheme: int4_g16}}}}"
"""Two blocks stay dense, and one has another scheme than the rest."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(write_tiny_llama(tmp_path_factory.mktemp("tiny"), num_hidden_layers=8), "tiny")


def recipe(passes: str) -> Recipe:
    calibration = "{source: builtin:calibration, samples: 4, tokens: 32, batch: 2}"
    return parse_recipe(f"calibration: {calibration}\npasses: [{passes}]\nevaluate: {{}}", "test")


class Steady:
    """A clock that is asked at the start of every run and after each of its parts, which take what the test says."""

    def __init__(self, *runs: list[float]) -> None:
        self.times = [time for parts in runs for time in accumulate(parts, initial=0.0)]

    def __call__(self) -> float:
        return self.times.pop(0)


def trial_of(tiny: Source, given: Recipe, *runs: list[float]) -> Trial:
    """Of runs whose parts take so long, all of which happen."""
    clock = Steady(*runs)
    bench = Bench(tiny, known_model(tiny), torch.device("cpu"), clock=clock)
    found = bench.trial(given, bench.windows(given))
    assert clock.times == []
    return found


def test_every_block_but_the_first_takes_what_lies_between_two(tiny: Source) -> None:
    trial = trial_of(tiny, recipe("{gptq: {scheme: int4_g16}}"), [3.0, 2.0])
    assert (trial.blocks, trial.seconds) == ((0, 1), pytest.approx(3 + 7 * 2))


def test_every_kind_of_block_counts_as_often_as_there_are_blocks_of_it(tiny: Source) -> None:
    """Blocks 0 and 1 stay dense, 2 and 4 are of the usual kind like three more, 3 is of its own."""
    trial = trial_of(tiny, recipe(MIXED), [9.0, 1.0, 2.0, 5.0, 4.0])
    assert (trial.blocks, trial.seconds) == ((0, 1, 2, 3, 4), pytest.approx(9 + 1 + 5 * 3 + 5))


def test_a_trial_on_all_blocks_finds_the_seconds_of_the_run(tiny: Source, tmp_path: Path) -> None:
    short = Source(write_tiny_llama(tmp_path, num_hidden_layers=2), "tiny")
    assert trial_of(short, recipe("{rtn: {scheme: int4_g16}}"), [3.0, 4.0]).seconds == pytest.approx(7)


def test_with_logits_two_runs_tell_blocks_and_head_apart(tiny: Source) -> None:
    """Choosing takes 2a + h on two blocks, 6a + h on six, and 8a + h on eight."""
    given = recipe("{width: {fraction: 0.25, score: taylor_first, refit: none}}")
    trial = trial_of(tiny, given, [2 * 3 + 5, 1, 1], [6 * 3 + 5, 1, 1, 1, 1, 1, 1])
    assert trial.blocks == (0, 1, 2, 3, 4, 5)
    assert trial.seconds == pytest.approx(8 * 3 + 5 + 8 * 1, rel=1e-6)


def test_a_decision_that_streams_feeds_nothing_from_the_last_block(tiny: Source) -> None:
    """Choosing takes 4 for every block and 1 less in all, so its fixed part is negative."""
    given = recipe("{width: {fraction: 0.25, refit: none}}")
    trial = trial_of(tiny, given, [4 - 1, 1], [2 * 4 - 1, 1, 1])
    assert trial.seconds == pytest.approx(8 * 4 - 1 + 8 * 1, rel=1e-6)


@pytest.mark.parametrize("again", [5.0, 4.9])
def test_what_a_pass_on_the_whole_model_takes_is_not_multiplied(tiny: Source, again: float) -> None:
    """Also where the second run happened to be the faster one."""
    given = recipe("{rtn: {scheme: int4_g16}}, {embeddings: {}}")
    trial = trial_of(tiny, given, [3.0, 5.0], [3.0, 2.0, again])
    assert trial.seconds == pytest.approx(3 + 7 * 2 + 5, rel=0.01)


def test_passes_that_train_the_whole_model_take_what_their_operations_say(tiny: Source) -> None:
    given = recipe("{recover: {training: {steps: 2, batch: 2}}}, {gptq: {scheme: int4_g16}}")
    trial = trial_of(tiny, given, [1.0, 1.0])
    assert trial.left_out == ("recover",) and trial.seconds > 8


def test_blocks_that_the_recipe_treats_differently_are_of_different_kinds(tiny: Source) -> None:
    kinds = kinds_of_blocks(recipe(MIXED), known_model(tiny).map)
    assert set(kinds) == {(0, 1), (2, 4, 5, 6, 7), (3,)}
    assert blocks_of_each_kind(kinds, 1) == (0, 2, 3)
    assert blocks_of_each_kind(kinds, 2) == (0, 1, 2, 3, 4)


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
    assert (counted.probed_blocks, probed.probed_blocks) == ((), (0, 1))
    same = {"sites", "output_bytes", "operations", "license", "publishes"}
    assert counted.model_dump(include=same) == probed.model_dump(include=same)
    assert {path.name: path.read_bytes() for path in tiny.folder.iterdir()} == before


def test_what_few_blocks_cannot_tell_is_estimated_from_operations_with_the_reason(tiny: Source) -> None:
    given = recipe("{depth: {blocks: [5]}}")
    found = plan(str(tiny.folder), given, machine=Machine(1e9), probe_on=torch.device("cpu"))
    assert found.probed_blocks == () and "estimated from operations" in found.warnings[-1]
