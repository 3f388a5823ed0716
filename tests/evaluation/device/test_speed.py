"""Speed is measured on what is claimed: steps of a runner, in turns, with everything left as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.evaluation.device.speed import compare_speed, random_prompt
from llmcompress.records.cost import Rate, Speed
from llmcompress.runners.torch_runner import TorchRunner
from tests.evaluation.device.clockwork import Clockwork
from tests.families import tiny_model


def test_every_turn_is_one_prompt_and_then_single_tokens_and_runners_take_turns() -> None:
    log: list[tuple[str, Any]] = []
    runners = {name: Clockwork(name) for name in ("a", "b")}
    for runner in runners.values():
        runner.log = log
    found = compare_speed(runners, dict.fromkeys(runners, torch.zeros(1, 7)), new_tokens=3, repeats=2)
    turn = [("a", 7), ("a", 1), ("a", 1), ("b", 7), ("b", 1), ("b", 1)]
    assert log == turn * 3, "one turn to warm up, then two"
    assert {name: len(speed.decode.turns) for name, speed in found.items()} == {"a": 2, "b": 2}


def test_rates_are_tokens_of_the_whole_batch_by_seconds_of_the_clock() -> None:
    runner = Clockwork(prefill=3.0, step=0.5)
    found = compare_speed({"m": runner}, {"m": torch.zeros(2, 6)}, new_tokens=5, repeats=3, clock=runner.clock)["m"]
    assert found.prefill.median == 2 * 6 / 3.0
    assert found.decode.median == 2 * 4 / (4 * 0.5), "the first new token belongs to the prompt"
    assert found.seconds_to_first_token == 3.0
    assert (found.prefill.spread, found.decode.spread) == (0.0, 0.0)
    assert Speed.model_validate_json(found.model_dump_json()) == found


def test_ratios_are_taken_turn_by_turn() -> None:
    slow, fast = Rate.of([10.0, 5.0, 8.0]), Rate.of([20.0, 20.0, 12.0])
    assert slow.median == 8.0 and slow.spread == pytest.approx(5 / 8)
    found = fast.ratio(slow)
    assert (found.median, found.lowest, found.highest) == (2.0, 1.5, 4.0)


@pytest.mark.parametrize("family", ["gpt2", "falcon_old", "bloom", "mixtral"])
def test_any_family_is_measured_and_left_as_it_was(family: str) -> None:
    model = tiny_model(family).train()
    with TorchRunner(model) as runner:
        prompt_BT = random_prompt(runner.vocabulary, batch=2, tokens=5)
        found = compare_speed({"m": runner}, {"m": prompt_BT}, new_tokens=3, repeats=2)["m"]
    assert found.decode.median > 0 and found.prefill.median > 0
    assert model.training and prompt_BT.shape == (2, 5)


def test_garbage_is_collected_between_turns_and_collecting_goes_on_afterwards() -> None:
    during: list[bool] = []

    class Watching(Clockwork):
        def stream(self, ids_BT: Tensor, *, max_new_tokens: int) -> Iterator[Tensor]:
            during.append(gc.isenabled())
            yield from super().stream(ids_BT, max_new_tokens=max_new_tokens)

    compare_speed({"m": Watching()}, {"m": torch.zeros(1, 3)}, new_tokens=2, repeats=1)
    assert during == [False, False] and gc.isenabled()
