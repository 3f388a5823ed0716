"""A uniformly smaller model becomes the stock model of a plain config, and stock loaders compute the same with it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmcompress.model.facts import Facts
from llmcompress.model.infer_config import with_inferred_config
from llmcompress.modules.cache_names import cache_of, with_cache
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.ranges import fit
from tests.families import FFN, randomise, tiny_model, tiny_tokens
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
    second = model(made[:, 8:], **with_cache(model.forward, cache_of(first)), use_cache=True)
    whole = model(made, use_cache=False).logits
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-4, atol=5e-5)
    assert torch.equal(made, model.generate(prompt, use_cache=False, **options))


FIXED_RATIO = {"bloom"}
"""An FFN that is always four times the hidden size."""
FIXED_HEADS = {"opt", "gpt2", "gpt_neox", "gpt_neox_sequential", "falcon", "stablelm", "stablelm_parallel"}
"""Families that compute the size of a head as hidden size ÷ heads, and read no other."""


@pytest.mark.parametrize("family", [family for family in WITH_CHANNELS if family not in FIXED_RATIO])
def test_fewer_channels_everywhere_are_a_plain_config(family, tmp_path):
    live, _ = shrunk_model(family, channels(family))
    result = with_inferred_config(live)
    assert result is not live
    assert_stock_computes_the_same(result, live, family, tmp_path)


@pytest.mark.parametrize("family", [family for family in WITH_HEADS if family not in FIXED_HEADS])
def test_fewer_heads_everywhere_are_a_plain_config_where_the_family_reads_the_size_of_a_head(family, tmp_path):
    live, _ = shrunk_model(family, half_heads(family))
    result = with_inferred_config(live)
    assert result is not live
    assert_stock_computes_the_same(result, live, family, tmp_path)


@pytest.mark.parametrize("family", ["opt", "gpt2", "falcon", "stablelm"])
def test_where_no_config_can_say_it_the_live_model_stays_as_it_is(family):
    live, _ = shrunk_model(family, half_heads(family))
    tokens = tiny_tokens(family)
    before, tensors = live(tokens).logits, {name: id(p) for name, p in live.named_parameters()}
    config = live.config.to_dict()
    assert with_inferred_config(live) is live
    assert torch.equal(live(tokens).logits, before)
    assert {name: id(p) for name, p in live.named_parameters()} == tensors
    assert live.config.to_dict() == config


@pytest.mark.parametrize("family", ["llama_gqa", "qwen3", "phi3"])
def test_heads_and_channels_at_once_are_a_plain_config(family, tmp_path):
    live, _ = shrunk_model(family, half_heads(family) | channels(family, 0.75))
    result = with_inferred_config(live)
    assert result.config.intermediate_size == 72
    assert result.config.num_attention_heads == 2
    assert_stock_computes_the_same(result, live, family, tmp_path)


@pytest.mark.parametrize("family", ["llama_gqa", "mistral", "qwen3", "gemma2", "olmo2", "phi"])
def test_a_smaller_hidden_size_is_found(family):
    """As after slicing the residual stream: heads keep their size, the FFN its width."""
    small = tiny_model(family).config
    small.head_dim = 24 if family == "qwen3" else 16
    small.hidden_size = 48
    live = small_model_that_says_otherwise(small, tiny_model(family).config)
    result = with_inferred_config(live)
    assert result is not live
    assert (result.config.hidden_size, result.config.head_dim) == (48, small.head_dim)
    tokens = tiny_tokens(family)
    torch.testing.assert_close(result(tokens).logits, live(tokens).logits, rtol=1e-4, atol=2e-5)


def small_model_that_says_otherwise(config, said):
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomise(model, 1)
    model.config = said
    return model.eval()


def test_a_norm_constant_that_a_pass_changed_reaches_the_config():
    live, _ = shrunk_model("llama", channels("llama"))
    for module in live.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 3e-3
    result = with_inferred_config(live)
    assert result.config.rms_norm_eps == 3e-3
    assert torch.allclose(result(tiny_tokens("llama")).logits, live(tiny_tokens("llama")).logits, atol=2e-5)


def test_blocks_of_different_width_have_no_plain_config():
    live, _ = shrunk_model("llama", channels("llama"))
    other = tiny_model("llama")
    live.model.layers[1] = other.model.layers[1]
    assert with_inferred_config(live) is live


def test_a_model_that_its_config_describes_is_given_back():
    model = tiny_model("llama")
    assert with_inferred_config(model) is model


def test_nothing_is_copied_and_everything_around_the_tensors_comes_along():
    live, _ = shrunk_model("llama_gqa", channels("llama_gqa"))
    live.generation_config.max_new_tokens = 7
    live.train()
    live.model.layers[0].eval()
    live.model.embed_tokens.weight.requires_grad_(False)
    result = with_inferred_config(live)
    assert result is not live
    ours = dict(result.named_parameters(remove_duplicate=False))
    assert all(ours[name] is parameter for name, parameter in live.named_parameters(remove_duplicate=False))
    assert result.lm_head.weight is result.model.embed_tokens.weight
    assert result.generation_config.max_new_tokens == 7
    assert [m.training for m in result.modules()] == [m.training for m in live.modules()]
    assert result.config._attn_implementation == live.config._attn_implementation
    assert live.config.intermediate_size == FFN
    assert not any(tensor.is_meta for tensor in (*result.parameters(), *result.buffers()))


def test_replaced_linears_come_along_whole():
    live, _ = shrunk_model("llama", channels("llama"))
    scheme = named_scheme("int8_channel")
    for layer in live.model.layers:
        weight_OI = layer.mlp.down_proj.weight.detach()
        fitted = fit(weight_OI, scheme.weights)
        layer.mlp.down_proj = QuantLinear.from_fitted(scheme, round_to_codes(weight_OI, fitted), fitted, None)
    result = with_inferred_config(live)
    assert result.config.intermediate_size == 48
    assert result.model.layers[2].mlp.down_proj is live.model.layers[2].mlp.down_proj


def test_half_precision_stays_half_precision():
    live, _ = shrunk_model("llama", channels("llama"))
    for parameter in live.parameters():  # not buffers: from_pretrained keeps rotary tables in float32
        parameter.data = parameter.data.to(torch.bfloat16)
    result = with_inferred_config(live)
    assert result is not live
    assert result.dtype == torch.bfloat16


def test_facts_find_every_difference():
    one, other = (Facts.of(tiny_model(family), frozenset()) for family in ("llama", "llama_gqa"))
    assert not one.differences(one)
    assert (4, 2) not in one.differences(other)
    assert (64, 32) in one.differences(other)
