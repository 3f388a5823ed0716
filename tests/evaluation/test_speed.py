"""Speed is measured on what is claimed: the cached greedy decode, in turns, with the model left as it was."""

from __future__ import annotations

import itertools

import pytest
import torch
from llmcompress.evaluation.speed import SpeedResult, compare_speed, measure_speed, speed_of
from torch import nn

from llmcompress.evaluation import speed as speed_module
from tests.families import tiny_model


class Calls(nn.Module):
    """Notes how often and with how many tokens the model inside is called."""

    def __init__(self, family: str, log: list[tuple[str, int]], name: str) -> None:
        super().__init__()
        self.inner, self.log, self.name = tiny_model(family), log, name
        self.config = self.inner.config

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> object:
        self.log.append((self.name, input_ids.shape[1]))
        return self.inner(input_ids, **kwargs)


def test_every_turn_is_one_prompt_and_then_single_tokens_and_models_take_turns() -> None:
    log: list[tuple[str, int]] = []
    models = {name: Calls("llama_gqa", log, name) for name in ("a", "b")}
    found = compare_speed(models, prompt_tokens=7, new_tokens=3, repeats=2)
    turn = [("a", 7), ("a", 1), ("a", 1), ("b", 7), ("b", 1), ("b", 1)]
    assert log == turn * 3, "one turn to warm up, then two"
    assert {name: result.repeats for name, result in found.items()} == {"a": 2, "b": 2}


def test_rates_are_tokens_by_seconds_of_the_clock() -> None:
    ticks = itertools.count()
    found = compare_speed(
        {"m": tiny_model("llama_gqa")}, prompt_tokens=6, new_tokens=5, repeats=3, clock=lambda: float(next(ticks))
    )["m"]
    assert found.prefill_tokens_per_second == 6.0
    assert found.decode_tokens_per_second == 4.0, "the first new token belongs to the prompt"
    assert found.seconds_to_first_token == 1.0
    assert (found.prefill_spread, found.decode_spread) == (0.0, 0.0)


@pytest.mark.parametrize("family", ["gpt2", "falcon_old", "bloom", "mixtral"])
def test_any_family_is_measured_and_left_as_it_was(family: str) -> None:
    model = tiny_model(family).train()
    result = measure_speed(model, prompt_tokens=5, new_tokens=3, repeats=2)
    assert result.decode_tokens_per_second > 0 and result.prefill_tokens_per_second > 0
    assert (result.device, result.dtype, result.threads) == ("cpu", "float32", torch.get_num_threads())
    assert model.training
    assert SpeedResult.model_validate_json(result.model_dump_json()) == result


def test_decoding_really_uses_the_cache_and_gives_the_greedy_tokens() -> None:
    model = tiny_model("llama_gqa")
    prompt = torch.randint(3, 100, (1, 6), generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"][0, -1].item()), with_kwargs=True
    )
    compare_speed({"m": model}, prompt_1T=prompt, new_tokens=5, repeats=1)
    handle.remove()
    ids = prompt
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert seen[1:5] == ids[0, 6:].tolist()


def test_models_are_found_by_name() -> None:
    found = speed_of({"builtin:books-llama": "builtin:books-llama"}, prompt_tokens=4, new_tokens=2, repeats=1)
    assert list(found) == ["builtin:books-llama"] and found["builtin:books-llama"].dtype == "float32"


def test_garbage_is_collected_between_runs_and_collecting_goes_on_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    during: list[bool] = []
    once = speed_module._once
    monkeypatch.setattr(
        speed_module, "_once", lambda *args: (during.append(speed_module.gc.isenabled()), once(*args))[1]
    )
    measure_speed(tiny_model("llama_gqa"), prompt_tokens=3, new_tokens=2, repeats=1)
    assert during == [False, False] and speed_module.gc.isenabled()
