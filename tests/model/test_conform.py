"""A uniformly smaller model becomes the stock model of a plain config, and stock loaders compute the same with it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmcompress.model.conform import conformed
from llmcompress.model.facts import Facts
from llmcompress.model.skeleton import find_blocks
from tests.families import FAMILIES, tiny_model, tiny_tokens
from tests.model.test_shrink import WITH_CHANNELS, WITH_HEADS, groups_of, shrunk_model


def channels(family, left=0.5):
    return {i: range(int(group.units * left)) for i, group in groups_of(family, "channels").items()}


def half_heads(family):
    return {i: range(0, group.units, 2) for i, group in groups_of(family, "heads").items()}


def reload(model, folder):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


@torch.no_grad()
def assert_stock_computes_the_same(result, live, family, folder):
    """The proof: the saved folder, opened with transformers alone, has the logits of the live model; and generates."""
    tokens = tiny_tokens(family)
    expected = live(tokens).logits
    torch.testing.assert_close(result(tokens).logits, expected, rtol=1e-4, atol=2e-5)
    stock = reload(result, folder)
    torch.testing.assert_close(stock(tokens).logits, expected, rtol=1e-4, atol=2e-5)
    assert_cache_is_right(stock, tokens)


@torch.no_grad()
def assert_cache_is_right(model, tokens):
    """Greedy generation with the cache picks what a forward without any cache would."""
    prompt = tokens[:1, :6]
    options = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5, "pad_token_id": 0}
    made = model.generate(prompt, use_cache=True, **options)
    assert made.shape[1] == 11
    first = model(made[:, :8], use_cache=True)
    second = model(made[:, 8:], past_key_values=first.past_key_values, use_cache=True)
    whole = model(made, use_cache=False).logits
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-4, atol=5e-5)
    assert torch.equal(made, model.generate(prompt, use_cache=False, **options))


@pytest.mark.parametrize("family", WITH_CHANNELS)
def test_fewer_channels_everywhere_are_a_plain_config(family, tmp_path):
    if family == "bloom":
        pytest.skip("its FFN is always four times the hidden size")
    live, _ = shrunk_model(family, channels(family))
    result = conformed(live)
    assert result is not live
    assert_stock_computes_the_same(result, live, family, tmp_path)


PLAIN_HEADS = [family for family in WITH_HEADS if conformed(shrunk_model(family, half_heads(family))[0]) is not None]
