"""The cost of a recipe follows from the map and the recipe alone."""

import builtins
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmcompress.cost import Cost, Machine, cost
from llmcompress.peak_memory import ModelSize
from llmcompress.presets import load_preset, preset_names
from llmcompress.recipe import Recipe, parse_recipe
from tests.passes.decomposition.factored import map_of

TINY = sorted(name for name in preset_names() if name.startswith("tiny/"))


class NoTorch(TorchDispatchMode):
    """Fails at the first operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was executed")


def cost_of(recipe: Recipe, **options: Any) -> Cost:
    return cost(recipe, map_of("llama_gqa"), ModelSize(10_000, 120), **options)


def test_no_tensor_is_computed_and_no_file_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = [load_preset(name) for name in TINY]
    before = [cost_of(recipe) for recipe in recipes]  # whatever is imported late is there now

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError(f"a file was opened: {args}")

    for module, name in ((builtins, "open"), (io, "open"), (os, "open"), (Path, "open"), (Path, "read_text")):
        monkeypatch.setattr(module, name, refuse)
    with NoTorch():
        after = [cost_of(recipe) for recipe in recipes]
    monkeypatch.undo()
    assert after == before


def test_the_guard_notices_an_operation() -> None:
    with pytest.raises(AssertionError, match="was executed"), NoTorch():
        torch.ones(2) + 1


def recipe(passes: str, samples: int = 8) -> Recipe:
    return parse_recipe(f"calibration: {{samples: {samples}, tokens: 64}}\npasses: [{passes}]", "test")


def test_forwards_and_operations_grow_with_what_a_pass_does() -> None:
    rtn, gptq = cost_of(recipe("{rtn: {}}")), cost_of(recipe("{gptq: {}}"))
    by_loss = cost_of(recipe("{mixed_precision: {quantizer: {gptq: {}}}}"))
    assert rtn.forwards == 0 and gptq.forwards == 2
    assert by_loss.forwards > gptq.forwards
    assert rtn.operations < gptq.operations < by_loss.operations
    assert cost_of(recipe("{gptq: {}}", samples=16)).operations > gptq.operations


def test_a_training_in_bfloat16_takes_the_seconds_of_bfloat16() -> None:
    def training(precision: str) -> Cost:
        steps = f"{{steps: 4, batch: 2, mixed_precision: {precision}}}"
        return cost_of(recipe(f"{{recover: {{teacher: original, training: {steps}}}}}"))

    plain, lowered = training("null"), training("bf16")
    machine = Machine(1e9, lowered_per_second=4e9)
    assert plain.lowered_operations == 0 < lowered.lowered_operations and plain.forwards == lowered.forwards
    through_once = cost_of(recipe("{gptq: {}}")).operations
    assert lowered.operations < through_once
    assert machine.seconds(lowered) - machine.seconds(plain) == pytest.approx(-0.75 * lowered.lowered_operations / 1e9)
    assert Machine(1e9).seconds(lowered) == pytest.approx(Machine(1e9).seconds(plain))


def test_calibration_in_bfloat16_leaves_statistics_to_float32() -> None:
    text = "calibration: {{samples: 8, tokens: 64, mixed_precision: {}}}\npasses: [gptq]"
    plain, mixed = (cost_of(parse_recipe(text.format(each), "test")) for each in ("null", "bf16"))
    assert plain.lowered_operations == 0 < mixed.operations < plain.operations
    assert mixed.operations + mixed.lowered_operations == pytest.approx(plain.operations)
    assert mixed.forwards == plain.forwards


def test_precision_of_choice_is_never_slower_than_float32() -> None:
    text = "calibration: {{samples: 8, tokens: 64, mixed_precision: {}}}\npasses: [gptq]"
    plain, chosen = (cost_of(parse_recipe(text.format(each), "test")) for each in ("null", "auto"))
    without, with_instructions = (Machine(4e9, lowered_per_second=speed) for speed in (1e9, 16e9))
    assert without.seconds(chosen) == pytest.approx(without.seconds(plain))
    assert with_instructions.seconds(chosen) < with_instructions.seconds(plain)


@pytest.mark.parametrize(("tokens", "inside"), [(8, False), (512, True)])
def test_memory_is_the_sum_done_by_hand(tokens: int, inside: bool) -> None:
    """Of the model; hidden states before and after; Gram matrices; a batch inside a block or what solving takes; the
    block that the guard compares with."""
    text = f"calibration: {{samples: 2, tokens: {tokens}, batch: 1}}\npasses: [gptq]\nevaluate: {{perplexity: []}}"
    outputs, grams, largest, weight = 64 + 32 + 32 + 64 + 96 + 96 + 64, 3 * 64**2 + 96**2, 96**2, 64 * 96
    in_a_block, solving = tokens * outputs, 2 * largest + 4 * weight
    assert (in_a_block > solving) == inside
    plain_block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96
    floats = 10_000 + 2 * 2 * tokens * 64 + grams + max(in_a_block, solving) + plain_block
    assert cost_of(parse_recipe(text, "test")).peak_bytes == 4 * floats


def test_weights_on_disk_take_less_memory() -> None:
    given = recipe("{gptq: {}}")
    large = ModelSize(10**9, 120)
    there, here = (cost(given, map_of("llama_gqa"), large, offloaded=off) for off in (True, False))
    assert there.peak_bytes < here.peak_bytes


def test_a_decided_recipe_costs_less_than_deciding() -> None:
    chosen = cost_of(recipe("{svd: {fraction: 0.2, ranks: loss}}"))
    given = cost_of(
        recipe("{svd: {fraction: 0.2, ranks: uniform, overrides: {'*.q_proj': {fraction: null, rank: 4}}}}")
    )
    assert given.operations < chosen.operations and given.peak_bytes <= chosen.peak_bytes


def test_a_greedy_search_by_perplexity_is_foretold_and_screening_makes_it_short() -> None:
    """Every candidate runs half of the blocks; influence is read in one forward a round; one more feeds the blocks."""
    text = "{{depth: {{count: {}, score: perplexity, mode: greedy{}}}}}"
    blocks = len(map_of("llama_gqa").blocks)
    assert cost_of(recipe(text.format(1, ""))).forwards == 1 + blocks / 2
    assert cost_of(recipe(text.format(2, ""))).forwards == 1 + blocks / 2 + (blocks - 1) / 2
    assert cost_of(recipe(text.format(2, ", screen: 1"))).forwards == 1 + 2 * 1.5
