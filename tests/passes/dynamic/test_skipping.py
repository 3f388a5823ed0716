from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.model.map import BlockInfo, BlockStructure, ModelMap
from llmcompress.model.readout import readout_of, watching
from llmcompress.model.skeleton import find_blocks
from llmcompress.modules.cache_names import cache_of, with_cache
from llmcompress.modules.dynamic import tallied
from llmcompress.modules.dynamic_exit import ExitBlock
from llmcompress.passes.base import PASSES
from llmcompress.passes.dynamic.early_exit import EarlyExit, outcome_at
from llmcompress.passes.dynamic.layer_skip import LayerSkip, threshold_for
from llmcompress.passes.dynamic.states import divergence
from llmcompress.recipe import parse_recipe
from tests.families import FAMILIES, HIDDEN, VOCABULARY, tiny_model, tiny_tokens


def whole_of(model: Any, *, storage_dtype: torch.dtype = torch.float32) -> WholeModel:
    """Six windows of 24 random tokens; of the map only the sizes are read."""
    nothing = BlockStructure((), (), (), ())
    blocks = tuple(BlockInfo(index, name, nothing) for index, (name, _) in enumerate(find_blocks(model)))
    width = model.get_input_embeddings().weight.shape[1]
    windows_NT = torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))
    return WholeModel(
        model,
        ModelMap("tiny", width, blocks, "", "", False),
        RunContext(windows_NT, batch=4, storage_dtype=storage_dtype),
    )


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(whole_of(model).context.windows_NT, use_cache=False).logits


def test_outcome_of_a_threshold_equals_looking_at_token_after_token() -> None:
    generator = torch.Generator().manual_seed(0)
    sure_NE, agrees_NE = torch.rand(50, 3, generator=generator), torch.rand(50, 3, generator=generator) < 0.6
    depths = [0.25, 0.5, 0.75]
    for threshold in (0.0, 0.3, 0.9, 0.99, 2.0):
        depth = agreement = 0.0
        for sure, agrees in zip(sure_NE.tolist(), agrees_NE.tolist(), strict=True):
            left = next((e for e in range(3) if sure[e] >= threshold), None)
            depth += 1.0 if left is None else depths[left]
            agreement += True if left is None else agrees[left]
        found = outcome_at(threshold, sure_NE, agrees_NE, torch.tensor(depths))
        assert found == pytest.approx((depth / 50, agreement / 50))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_follows_the_last_block_is_found_and_predicts_the_models_tokens(family: str) -> None:
    model = tiny_model(family, seed=1)
    names = readout_of(model, tiny_tokens(family))
    assert model.get_submodule(names[-1]) is model.get_output_embeddings()
    assert 1 <= len(names) <= 3


def test_a_model_that_does_more_after_its_last_block_is_refused() -> None:
    model = tiny_model("llama_gqa")
    handle = model.register_forward_hook(lambda _, __, out: setattr(out, "logits", out.logits.flip(-1)))
    with pytest.raises(CompressError) as caught:
        readout_of(model, tiny_tokens("llama_gqa"))
    handle.remove()
    assert caught.value.code == "dynamic.readout"


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "opt", "gemma2"])
def test_a_threshold_above_one_changes_no_bit(family: str) -> None:
    model = tiny_model(family, seed=1)
    dense = logits(model)
    rows = EarlyExit(threshold=1.5, exits=(1, 2)).apply(whole_of(model))
    assert torch.equal(logits(model), dense)
    assert {row.active for row in rows} == {1.0}


@pytest.mark.parametrize("jump", [True, False])
@pytest.mark.parametrize("confidence", ["divergence", "probability"])
def test_the_mean_depth_asked_for_is_met_on_calibration_text(jump: bool, confidence: str) -> None:
    model = tiny_model("llama_gqa", seed=1)
    rows = EarlyExit(depth=0.8, exits=(1, 2), jump=jump, confidence=confidence).apply(whole_of(model))
    assert (1 + sum(row.active for row in rows)) / 3 == pytest.approx(0.8, abs=0.03)
    assert [row.site for row in rows] == ["model.layers.1", "model.layers.2"]
    assert rows[1].active <= rows[0].active, "a token that left stays away"


def test_agreement_is_kept_and_is_the_rule_by_default() -> None:
    whole = whole_of(model := tiny_model("llama_gqa", seed=1))
    dense = logits(model).argmax(-1)
    default = EarlyExit().apply(whole)
    assert default[0].score == EarlyExit(agreement=0.95).apply(whole_of(tiny_model("llama_gqa", seed=1)))[0].score
    exact = tiny_model("llama_gqa", seed=1)
    EarlyExit(agreement=1.0).apply(whole_of(exact))
    leaves = [block for _, block in find_blocks(exact) if isinstance(block, ExitBlock)]
    with tallied(exact) as counts:
        same = logits(exact).argmax(-1) == dense
    # states of later tokens shift a little once earlier ones have left
    assert float(same.float().mean()) > 0.95 and leaves
    assert all(count.share > 0.5 for count in counts.values())


def test_divergence_is_the_textbook_sum_over_the_vocabulary() -> None:
    model = tiny_model("llama_gqa", seed=1)
    read = [model.model.norm, model.lm_head]
    final_ND, here_ND = torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p, q = (model.lm_head(model.model.norm(state)).double().softmax(-1) for state in (final_ND, here_ND))
        slow = [sum(float(a * (a / b).log()) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)]
        found = divergence(read, final_ND, here_ND)
    torch.testing.assert_close(found.double(), torch.tensor(slow, dtype=torch.float64), atol=1e-5, rtol=1e-4)


def test_the_judge_of_an_exit_follows_the_divergence_it_foretells() -> None:
    model = tiny_model("llama_gqa", seed=1)
    states: dict[int, list[Tensor]] = {1: [], 3: []}
    with (
        watching(model, lambda index, state: states[index].append(state) if index in states else None),
        torch.no_grad(),
    ):
        for ids in whole_of(model).batches():
            model(ids)
    here, final = (torch.cat(states[index]) for index in (1, 3))
    read = [model.model.norm, model.lm_head]
    EarlyExit(threshold=0.5, exits=(1,), ridge=1e-6, jump=False).apply(whole_of(model))
    true = divergence(read, final, here).log()
    foretold = find_blocks(model)[1][1].predictor(here).log()
    assert (foretold - true).square().mean() < 0.7 * true.var()


def test_jumps_are_the_weighted_least_squares_from_exit_to_end_in_the_stored_dtype() -> None:
    model = tiny_model("llama_gqa", seed=1)
    states: dict[int, list[Tensor]] = {1: [], 3: []}
    whole = whole_of(model, storage_dtype=torch.bfloat16)
    with (
        watching(model, lambda index, state: states[index].append(state) if index in states else None),
        torch.no_grad(),
    ):
        for ids in whole.batches():
            model(ids)
    x, y = (torch.cat(states[index]).double() for index in (1, 3))
    weight = y.square().mean(1).rsqrt()[:, None]
    x1 = torch.cat([x, torch.ones(len(x), 1)], 1)
    EarlyExit(threshold=0.5, exits=(1,), ridge=1e-9).apply(whole)
    block = find_blocks(model)[1][1]
    slow = torch.linalg.lstsq(x1 * weight, y * weight).solution
    torch.testing.assert_close(block.jump_DD.T, slow[:-1].float(), atol=0.02, rtol=0.02)
    assert torch.equal(block.jump_DD, block.jump_DD.bfloat16().float())


@pytest.mark.parametrize("exits", [(0,), (3,), (1, 7)])
def test_an_exit_without_a_block_before_or_behind_it_is_refused(exits: tuple[int, ...]) -> None:
    with pytest.raises(CompressError) as caught:
        EarlyExit(exits=exits).apply(whole_of(tiny_model("llama_gqa")))
    assert caught.value.code == "dynamic.exits" and "from 1 to 2" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "options"),
    [("early_exit", {"depth": 0.5, "agreement": 0.9}), ("layer_skip", {"skip": 0.1, "threshold": 0.2})],
)
def test_two_rules_for_one_threshold_are_refused(name: str, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give one of"):
        PASSES[name](**options)


def test_what_decides_per_input_comes_last() -> None:
    early, late = "- early_exit: {depth: 0.8}\n", "- gptq: {scheme: int4_g32}\n"
    parse_recipe("passes:\n" + late + early, "test")
    with pytest.raises(CompressError) as caught:
        parse_recipe("passes:\n" + early + late, "test")
    assert caught.value.code == "recipe.order" and "must come last" in caught.value.what
    parse_recipe("passes:\n- activation_sparsity: {}\n- layer_skip: {}\n- early_exit: {}\n", "test")


@torch.no_grad()
def test_both_dynamic_passes_stand_on_the_same_blocks() -> None:
    model = tiny_model("llama_gqa", seed=1)
    whole = whole_of(model)
    LayerSkip(skip=0.3).apply(whole)
    EarlyExit(depth=0.8).apply(whole)
    ids = tiny_tokens("llama_gqa", batch=1)
    out = model(ids[:, :4], use_cache=True)
    found = [out.logits]
    for place in range(4, ids.shape[1]):
        out = model(ids[:, place : place + 1], **with_cache(model.forward, cache_of(out)), use_cache=True)
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), model(ids, use_cache=False).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "falcon", "mixtral"])
def test_skipping_nothing_changes_nothing(family: str) -> None:
    for options in ({"skip": 0.0}, {"threshold": 0.0}):
        model = tiny_model(family, seed=1)
        dense = logits(model)
        assert LayerSkip(**options).apply(whole_of(model)) == []
        assert torch.equal(logits(model), dense)


def test_the_share_asked_for_is_skipped_on_calibration_text() -> None:
    model = tiny_model("llama_gqa", seed=1)
    rows = LayerSkip(skip=0.25).apply(whole_of(model))
    skipped = sum(1 - row.active for row in rows) / 3
    assert 0.1 < skipped < 0.45, "earlier skips shift what later tests see"
    assert threshold_for(torch.arange(12.0).view(3, 4), 0.25) == 3.0
    assert threshold_for(torch.arange(12.0).view(3, 4), 0.0) == 0.0


def test_the_test_before_a_block_follows_the_influence_it_foretells() -> None:
    """On the calibration tokens themselves, with hardly any pull, more is explained than by a constant."""
    model = tiny_model("llama_gqa", seed=1)
    states: dict[int, list[Tensor]] = {index: [] for index in range(4)}
    with watching(model, lambda index, state: states[index].append(state)), torch.no_grad():
        for ids in whole_of(model).batches():
            model(ids)
    LayerSkip(skip=0.99, ridge=1e-6).apply(whole_of(model))
    for index, (_, block) in enumerate(find_blocks(model)):
        before, after = torch.cat(states[index]), torch.cat(states[index + 1])
        influence = (1 - torch.cosine_similarity(before, after, dim=1)).log()
        foretold = block.predictor(before).log()
        assert (foretold - influence).square().mean() < 0.7 * influence.var()
