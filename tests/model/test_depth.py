"""Without some blocks a model computes as if they were skipped; numbers, config, cache and saved folder are right."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from llmcompress.errors import CompressError
from llmcompress.model.depth import drop_blocks
from llmcompress.model.probe import map_model
from llmcompress.model.skeleton import find_blocks
from llmcompress.modules.cache_names import with_cache
from tests.families import FAMILIES, randomise, tiny_config, tiny_model, tiny_tokens
from tests.model.test_infer_config import assert_cache_is_right, assert_stock_computes_the_same
from tests.model.test_shrink import shrunk_model


class Skipped(nn.Module):
    """A block that does nothing, and answers for the attributes of the one that stood there."""

    def __init__(self, block, returns_tuple):
        super().__init__()
        self.__dict__["block"], self.__dict__["returns_tuple"] = block, returns_tuple

    def __getattr__(self, name):
        return getattr(self.__dict__["block"], name)

    def forward(self, hidden, *args, **kwargs):
        return (hidden, None, None) if self.returns_tuple else hidden


@torch.no_grad()
def with_blocks_skipped(model, indices):
    """The same model with identities in the place of blocks: what removal must equal, without any cache."""
    model = copy.deepcopy(model)
    for index in indices:
        name, block = find_blocks(model)[index]
        parent, _, leaf = name.rpartition(".")
        kind = []
        handle = block.register_forward_hook(lambda _, __, output, kind=kind: kind.append(type(output)))
        model(torch.ones(1, 2, dtype=torch.long), use_cache=False)
        handle.remove()
        model.get_submodule(parent)[int(leaf)] = Skipped(block, kind[0] is tuple)
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_without_blocks_every_family_computes_as_if_they_were_skipped_and_generates(family, tmp_path):
    model = tiny_model(family)
    gone = [0] if model.config.num_hidden_layers == 2 else [1]
    tokens = tiny_tokens(family)
    expected = with_blocks_skipped(model, gone)(tokens, use_cache=False).logits
    before = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in find_blocks(model)[gone[0]][1].parameters())
    drop_blocks(model, gone)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=2e-5)
    assert sum(p.numel() for p in model.parameters()) == before - block
    assert_cache_is_right(model, tokens)
    assert_stock_computes_the_same(model, model, family, tmp_path)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == model.config.tie_word_embeddings


FULL, SLIDING = "full_attention", "sliding_attention"

PATTERNS = {
    "gemma2": (lambda: tiny_config("gemma2"), [0], {"layer_types": [FULL, SLIDING, FULL]}),
    "gemma3": (
        lambda: small("gemma3_text", head_dim=16, sliding_window=4, layer_types=[SLIDING, SLIDING, FULL, SLIDING]),
        [0, 3],
        {"layer_types": [SLIDING, FULL]},
    ),
    "qwen2 with windows": (
        lambda: small("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2),
        [1],
        {"layer_types": [FULL, SLIDING, SLIDING]},
    ),
    "smollm3": (lambda: small("smollm3", no_rope_layers=[1, 0, 1, 0]), [0], {"no_rope_layers": [0, 1, 0]}),
    "gpt_neo": (
        lambda: AutoConfig.for_model(
            "gpt_neo", vocab_size=128, hidden_size=64, num_layers=4, num_heads=4,
            attention_types=[[["global", "local"], 2]], window_size=4, intermediate_size=96,
            max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        ),
        [0],
        {"attention_layers": ["local", "global", "local"]},
    ),
    "qwen3_moe with dense blocks": (
        lambda: small(
            "qwen3_moe", head_dim=16, num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2,
            mlp_only_layers=[0, 3],
        ),
        [1],
        {"mlp_only_layers": [0, 2]},
    ),
    "deepseek with dense first blocks": (
        lambda: small(
            "deepseek_v2", first_k_dense_replace=2, n_routed_experts=4, moe_intermediate_size=32, num_experts_per_tok=2,
            n_shared_experts=1, kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
            num_key_value_heads=4, topk_method="greedy", n_group=1, topk_group=1,
        ),
        [0],
        {"first_k_dense_replace": 1},
    ),
}  # fmt: skip
"""Families whose blocks differ by place: config, blocks that go, and what the config must say afterwards."""


def small(model_type, **options):
    sizes = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return AutoConfig.for_model(model_type, **{**sizes, **options})


def random_model(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomise(model, 0)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("case", PATTERNS)
def test_blocks_that_differ_by_place_keep_their_kind(case, tmp_path):
    make, gone, says = PATTERNS[case]
    model = random_model(make())
    tokens = tiny_tokens("llama")
    expected = with_blocks_skipped(model, gone)(tokens, use_cache=False).logits
    drop_blocks(model, gone)
    assert {name: getattr(model.config, name) for name in says} == says
    torch.testing.assert_close(model(tokens, use_cache=False).logits, expected, rtol=1e-4, atol=2e-5)
    assert_cache_is_right(model, tokens)
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()
    torch.testing.assert_close(stock(tokens, use_cache=False).logits, expected, rtol=1e-4, atol=2e-5)
    assert_cache_is_right(stock, tokens)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama_gqa", "phi3", "opt", "gpt2"])
def test_narrower_blocks_can_be_dropped_too(family):
    model, _ = shrunk_model(family, {0: [1], 1: range(48)})
    tokens = tiny_tokens(family)
    expected = with_blocks_skipped(model, [0])(tokens, use_cache=False).logits
    drop_blocks(model, [0])
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=2e-5)
    assert len(find_blocks(model)) == model.config.num_hidden_layers == 2
    assert_cache_is_right(model, tokens)


def test_dropping_twice_is_dropping_once():
    once, twice = tiny_model("gemma2"), tiny_model("gemma2")
    drop_blocks(once, [0, 2])
    drop_blocks(twice, {2})
    drop_blocks(twice, [0])
    tokens = tiny_tokens("gemma2")
    assert torch.equal(once(tokens).logits, twice(tokens).logits)
    assert once.config.to_dict() == twice.config.to_dict()
    assert [layer.self_attn.layer_idx for layer in once.model.layers] == [0, 1]


def test_where_the_place_of_a_block_changes_what_it_computes_nothing_is_dropped():
    config = tiny_config("gpt2")
    config.scale_attn_by_inverse_layer_idx = True
    model = random_model(config)
    tokens = tiny_tokens("gpt2")
    before, said = model(tokens).logits, model.config.to_dict()
    with pytest.raises(
        CompressError, match=r"depth\.(place-matters|no-config)"
    ):  # 4 scales in forward, 5 notes it before
        drop_blocks(model, [0])
    assert torch.equal(model(tokens).logits, before)
    assert model.config.to_dict() == said
    drop_blocks(model, [2])  # the last one: all others keep their place
    assert model.config.n_layer == 2


def test_a_block_that_computes_with_its_own_number_is_found_out_and_everything_is_set_back():
    model = tiny_model("llama")
    attention = model.model.layers[2].self_attn
    attention.register_forward_hook(lambda module, _, output: (output[0] * module.layer_idx, *output[1:]))
    tokens = tiny_tokens("llama")
    before, said = model(tokens).logits, model.config.to_dict()
    with pytest.raises(CompressError, match=r"block 2 depends on its position[\s\S]*depth\.place-matters"):
        drop_blocks(model, [1])
    assert torch.equal(model(tokens).logits, before)
    assert model.config.to_dict() == said
    assert attention.layer_idx == 2


def test_kinds_of_blocks_that_no_config_can_order_so_are_refused():
    # every second block has experts, counted from the front
    config = small(
        "qwen3_moe", head_dim=16, num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2, decoder_sparse_step=2
    )
    model = random_model(config)
    with pytest.raises(CompressError, match=r"depth\.no-config"):
        drop_blocks(model, [0])
    assert len(find_blocks(model)) == 4
    drop_blocks(model, [0, 1])
    assert map_model(model).blocks[1].structure != map_model(model).blocks[0].structure


@pytest.mark.parametrize("indices", [[3], [-1], [0, 1, 2]])
def test_blocks_that_do_not_exist_and_all_blocks_cannot_go(indices):
    with pytest.raises(ValueError, match="cannot be removed"):
        drop_blocks(tiny_model("llama"), indices)


def test_dropping_nothing_changes_nothing():
    model = tiny_model("llama")
    drop_blocks(model, [])
    assert model.config.num_hidden_layers == 3


def test_lists_of_token_ids_are_not_taken_for_lists_of_blocks():
    config = tiny_config("llama")
    config.eos_token_id = [2, 5, 7]
    model = random_model(config)
    drop_blocks(model, [1])
    assert model.config.eos_token_id == [2, 5, 7]


def test_a_training_model_is_checked_without_its_dropout_and_keeps_training():
    config = tiny_config("gpt2")
    config.resid_pdrop = 0.5
    model = random_model(config).train()
    drop_blocks(model, [1])
    assert model.training
    assert all(module.training for module in model.modules())


def test_the_cache_of_the_smaller_model_has_one_layer_per_block():
    model = tiny_model("gemma2")
    drop_blocks(model, [1])
    cache = DynamicCache(config=model.config)
    model(tiny_tokens("gemma2"), **with_cache(model.forward, cache), use_cache=True)
    assert len(cache.layers) == 3
