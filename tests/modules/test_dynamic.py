"""Blocks that skip: the cache stays whole, a cached decode decides as one forward does, threshold 0 is exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.model.readout import readout_of, watching
from llmcompress.model.skeleton import find_blocks
from llmcompress.model.stock import stock_model
from llmcompress.modules.cache_names import cache_of, with_cache
from llmcompress.modules.dynamic import DynamicBlock, tallied
from llmcompress.modules.dynamic_exit import ExitBlock
from llmcompress.modules.dynamic_skip import SkipBlock
from llmcompress.modules.linear_predictor import LinearPredictor
from llmcompress.modules.manifest import Manifest, apply_manifest, changes
from llmcompress.passes.dynamic.states import put_around
from tests.families import FAMILIES, HIDDEN, tiny_model, tiny_tokens

NEVER, ALWAYS = 0.0, float("inf")


def skip_blocks(model: Any, threshold: float) -> dict[int, SkipBlock]:
    """Random tests of the size of the hidden state; at threshold 1 about half of the tokens skip a block."""
    width = model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(3)
    return {
        index: SkipBlock(LinearPredictor(torch.randn(width, generator=generator) * width**-0.5, 0.0), threshold)
        for index in range(len(find_blocks(model)))
    }


def exit_blocks(model: Any, threshold: float, *, jump: bool = True, foretold: bool = False) -> dict[int, ExitBlock]:
    """Exits before every block but the first."""
    width = model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(4)
    readout = readout_of(model, torch.arange(3, 11)[None])
    found = {}
    for index in range(1, len(find_blocks(model))):
        matrix_DD = torch.eye(width) + 0.2 * width**-0.5 * torch.randn(width, width, generator=generator)
        predictor = LinearPredictor(torch.randn(width, generator=generator) * width**-0.5, 0.0) if foretold else None
        found[index] = ExitBlock(threshold, readout, (matrix_DD, torch.zeros(width)) if jump else None, predictor)
    return found


def skipping(family: str, threshold: float = 1.0) -> Any:
    model = tiny_model(family, seed=1)
    put_around(model, skip_blocks(model, threshold))
    return model


def exiting(family: str, *, jump: bool = True, foretold: bool = False) -> Any:
    """About half of all tokens leave at the first exit."""
    model = tiny_model(family, seed=1)
    blocks = exit_blocks(model, 0.5, jump=jump, foretold=foretold)
    put_around(model, blocks)
    sure = []
    with watching(model, lambda index, state: sure.append(blocks[1].confidence(state)) if index == 1 else None):
        model(tiny_tokens(family))
    middle = sure[0].sort().values[len(sure[0]) // 2 - 1 :][:2].mean()  # between two tokens: no decision is a close one
    for block in blocks.values():
        block.threshold = float(middle)
    return model


MAKERS = {"skip": skipping, "exit": exiting, "exit foretold": partial(exiting, jump=False, foretold=True)}


@torch.no_grad()
def cached(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """Logits of all positions: the prompt in one call, then token by token."""
    out = model(ids[:, :prompt], use_cache=True)
    logits = [out.logits]
    for place in range(prompt, ids.shape[1]):
        out = model(ids[:, place : place + 1], **with_cache(model.forward, cache_of(out)), use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cached_decode_computes_what_one_forward_computes(family: str, maker: str) -> None:
    model, ids = MAKERS[maker](family), tiny_tokens(family)
    with tallied(model) as counts:
        full = model(ids, use_cache=False).logits
    decided = [count.share for count in counts.values()]
    assert 0.05 < sum(decided) / len(decided) < 0.95, "some run and some skip"
    with tallied(model) as counts:
        alone = torch.cat([cached(model, row[None], 4) for row in ids])
        together = cached(model, ids, 4)
    assert sum(count.skipped_calls for count in counts.values()) > 0
    torch.testing.assert_close(alone, full, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(together, full, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_stock_generate_gives_the_greedy_tokens_of_full_forwards(family: str, maker: str) -> None:
    model, ids = MAKERS[maker](family), tiny_tokens(family, batch=1, length=5)
    made = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    for _ in range(6):
        logits = model(ids, use_cache=False).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert made.tolist() == ids.tolist()


@contextmanager
def skipped_by_hooks(model: Any, wrappers: dict[int, SkipBlock]) -> Iterator[None]:
    """The textbook way: every block of the stock model runs, and its output is thrown away where it is skipped."""
    handles = []
    for index, (_, block) in enumerate(find_blocks(model)):

        def hook(_: Any, args: Any, kwargs: Any, output: Any, index: int = index) -> Any:
            before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            after = output if isinstance(output, Tensor) else output[0]
            after = torch.where(wrappers[index].skips(before)[..., None], before, after)
            return after if isinstance(output, Tensor) else (after, *output[1:])

        handles.append(block.register_forward_hook(hook, with_kwargs=True))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "gemma2", "falcon_old", "mixtral"])
@torch.no_grad()
def test_skipping_equals_running_everything_and_throwing_it_away(family: str) -> None:
    stock, ids = tiny_model(family, seed=1), tiny_tokens(family)
    with skipped_by_hooks(stock, skip_blocks(stock, 1.0)):
        slow = stock(ids, use_cache=False).logits
    assert torch.equal(skipping(family)(ids, use_cache=False).logits, slow)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_thresholds_that_nothing_reaches_change_no_bit(family: str) -> None:
    stock, ids = tiny_model(family, seed=1), tiny_tokens(family)
    dense = stock(ids).logits
    assert torch.equal(skipping(family, NEVER)(ids).logits, dense)
    model = tiny_model(family, seed=1)
    put_around(model, exit_blocks(model, 2.0))
    assert torch.equal(model(ids).logits, dense)
    assert torch.equal(cached(model, ids, 3), cached(stock, ids, 3))


@torch.no_grad()
def test_a_skipped_block_stores_keys_and_values_but_runs_neither_output_projection_nor_feed_forward() -> None:
    model, ids = skipping("llama_gqa", NEVER), tiny_tokens("llama_gqa", batch=1, length=6)
    out = model(ids[:, :5], use_cache=True)
    blocks = [block for _, block in find_blocks(model)]
    ran: list[str] = []
    for name, part in model.named_modules():
        if name.endswith(("o_proj", "mlp", "k_proj", "v_proj")):
            part.register_forward_hook(lambda *_, name=name: ran.append(name.rpartition(".")[2]))
    for block in blocks:
        block.threshold = ALWAYS
    with tallied(model) as counts:
        out = model(ids[:, 5:], **with_cache(model.forward, cache_of(out)), use_cache=True)
    assert ran == ["k_proj", "v_proj"] * len(blocks)
    assert [count.skipped_calls for count in counts.values()] == [1] * len(blocks)
    assert [cache_of(out).get_seq_length(layer) for layer in range(len(blocks))] == [6] * len(blocks)
    embedded = model.get_input_embeddings()(ids[:, 5:])
    torch.testing.assert_close(out.logits, model.lm_head(model.model.norm(embedded)))
    normed = blocks[2].inner.input_layernorm(embedded)
    values = blocks[2].inner.self_attn.v_proj(normed).view(1, 1, 2, -1).transpose(1, 2)
    layer = cache_of(out).layers[2]
    torch.testing.assert_close(layer.values[:, :, -1:], values)


@torch.no_grad()
def test_a_token_that_left_is_carried_to_the_end_by_the_jump_of_its_exit() -> None:
    model, ids = tiny_model("llama_gqa", seed=1), tiny_tokens("llama_gqa", batch=1)
    blocks = exit_blocks(model, 1e-9)
    states: dict[int, Tensor] = {}
    with watching(model, states.__setitem__):
        model(ids)
    put_around(model, blocks)
    expected = model.lm_head(model.model.norm(blocks[1].jump(states[1])))[None]
    torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("maker", MAKERS)
@torch.no_grad()
def test_the_manifest_rebuilds_the_same_decisions_under_the_same_names(maker: str) -> None:
    model, ids = MAKERS[maker]("llama_gqa"), tiny_tokens("llama_gqa")
    found = Manifest.from_json(changes(model, stock_model(model)).to_json())
    again = tiny_model("llama_gqa", seed=9)
    apply_manifest(again, found, torch.float32)
    again.load_state_dict(model.state_dict(), strict=True)
    again.tie_weights()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_names_of_a_skipping_block_are_new_and_the_old_one_is_taken_by_an_empty_tensor() -> None:
    stock, model = tiny_model("llama_gqa"), skipping("llama_gqa")
    block = "model.layers.0."
    names = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(block)}
    common = names.keys() & stock.state_dict().keys()
    assert len(common) == 1 and all(names[name].numel() == 0 for name in common)


def test_a_dynamic_block_answers_for_the_block_inside_and_shows_its_hidden_states() -> None:
    model, ids = skipping("mistral"), tiny_tokens("mistral")
    wrapped = find_blocks(model)[0][1]
    assert isinstance(wrapped, DynamicBlock) and wrapped.hidden_size == HIDDEN
    assert len(model(ids, output_hidden_states=True).hidden_states) == 4


def test_tallies_end_with_their_context() -> None:
    model, ids = skipping("llama_gqa", ALWAYS), tiny_tokens("llama_gqa")
    with tallied(model) as counts:
        model(ids, use_cache=False)
    model(ids, use_cache=False)
    assert [(count.total, count.active, count.calls) for count in counts.values()] == [(ids.numel(), 0, 1)] * 3
    assert all(count.share == 0 for count in counts.values())
