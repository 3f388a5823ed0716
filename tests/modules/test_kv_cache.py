"""Keys and values as codes: one rounding for evaluation and generation, a cache that is really smaller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache

from llmcompress.errors import CompressError
from llmcompress.model.cache_users import cache_users
from llmcompress.model.skeleton import find_blocks, put_module
from llmcompress.model.stock import stock_model
from llmcompress.modules.cache_names import cache_of, with_cache
from llmcompress.modules.dynamic_skip import SkipBlock
from llmcompress.modules.kv_cache import CodedAttention
from llmcompress.modules.linear_predictor import LinearPredictor
from llmcompress.modules.manifest import Manifest, apply_manifest, changes
from llmcompress.passes.dynamic.states import put_around
from tests.families import FAMILIES, tiny_model, tiny_tokens
from tests.modules.test_dynamic import cached

FORMS = [("int8", "token"), ("fp8", "token"), ("int8", "channel"), ("fp8", "tensor")]


def coded_model(family: str, number: Any = "int8", scales: Any = "token", dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model(family, seed=1, dtype=dtype)
    for user in cache_users(model, tiny_tokens(family)):
        wrapper = CodedAttention(number, scales, user.argument, user.heads, user.widths)
        if scales != "token":
            wrapper.key_scale.fill_(0.02)
            wrapper.value_scale.fill_(0.02)
        wrapper.take(model.get_submodule(user.name))
        put_module(model, user.name, wrapper)
    return model.eval()


def stored_bytes(cache: Any) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


@pytest.mark.parametrize(("number", "scales"), FORMS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cached_decode_computes_what_one_forward_computes(family: str, number: str, scales: str) -> None:
    """Sliding windows of 5 tokens included: the texts are 12 tokens long."""
    model, ids = coded_model(family, number, scales), tiny_tokens(family)
    whole = model(ids, use_cache=False).logits
    dense = tiny_model(family, seed=1)(ids).logits
    moved = (whole - dense).abs()
    assert moved.max() > 0, "something is rounded"
    together = cached(model, ids, 4)
    # sums in another order move single numbers to the next code
    assert (together - whole).abs().median() < 0.02 * moved.median()
    assert torch.equal(model(ids, use_cache=True).logits, whole)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_stock_generate_gives_the_greedy_tokens_of_full_forwards(family: str) -> None:
    model, ids = coded_model(family), tiny_tokens(family, batch=1, length=5)
    made = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for _ in range(8):
        logits = model(ids, use_cache=False).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert made.tolist() == ids.tolist()


@pytest.mark.parametrize(("number", "scales"), FORMS)
@torch.no_grad()
def test_the_cache_that_generate_fills_is_as_small_as_said(number: str, scales: str) -> None:
    model, ids = coded_model("qwen3", number, scales, torch.bfloat16), tiny_tokens("qwen3", batch=2, length=9)
    made = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    tokens = 2 * (9 + 3)
    wrappers = [part for part in model.modules() if isinstance(part, CodedAttention)]
    assert stored_bytes(cache_of(made)) == tokens * sum(part.bytes_per_token for part in wrappers)
    assert cache_of(made).get_seq_length() == 12
    dense = cache_of(tiny_model("qwen3", dtype=torch.bfloat16)(made.sequences[:, :-1], use_cache=True))
    share = (24 + 2) / (2 * 24) if scales == "token" else 0.5
    assert stored_bytes(cache_of(made)) == pytest.approx(share * stored_bytes(dense))


def _slow(x: Tensor, number: str) -> Tensor:
    """One vector after the other, in float64."""
    out = x.double().clone()
    for vector in out.view(-1, x.shape[-1]):
        largest = {"int8": 127.0, "fp8": 448.0}[number]
        scale = float(torch.tensor(float(vector.abs().max()) / largest).bfloat16()) or 1.0
        steps = (vector / scale).clamp(-largest, largest)
        rounded = steps.round() if number == "int8" else steps.float().to(torch.float8_e4m3fn).double()
        vector.copy_(rounded * scale)
    return out


@pytest.mark.parametrize("number", ["int8", "fp8"])
@torch.no_grad()
def test_what_is_cached_is_the_stock_models_rotated_keys_and_values_rounded(number: str) -> None:
    model, ids = coded_model("llama_gqa", number), tiny_tokens("llama_gqa")
    stock = cache_of(tiny_model("llama_gqa", seed=1)(ids, use_cache=True)).layers[0]
    layer = cache_of(model(ids, use_cache=True)).layers[0]
    for codes, coding, dense in (
        (layer.keys, layer.key_coding, stock.keys),
        (layer.values, layer.value_coding, stock.values),
    ):
        assert codes.dtype == torch.int8 and codes.shape == (*dense.shape[:-1], dense.shape[-1] + 2)
        torch.testing.assert_close(coding.decode(codes, torch.float64), _slow(dense, number), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_beams_batches_and_crops_take_the_scales_along() -> None:
    model, ids = coded_model("llama_gqa"), tiny_tokens("llama_gqa", batch=2, length=6)
    beams = model.generate(ids, max_new_tokens=6, min_new_tokens=6, num_beams=3, do_sample=False)
    without = model.generate(ids, max_new_tokens=6, min_new_tokens=6, num_beams=3, do_sample=False, use_cache=False)
    assert beams.tolist() == without.tolist()
    cache = cache_of(model(ids, use_cache=True))
    cache.crop(-2)
    again = model(ids[:, 4:], **with_cache(model.forward, cache), use_cache=True).logits
    torch.testing.assert_close(again, model(ids, use_cache=False).logits[:, 4:], atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_a_cache_filled_by_the_dense_model_is_rounded_where_it_is_taken_over() -> None:
    model, dense = coded_model("llama_gqa"), tiny_model("llama_gqa", seed=1)
    ids = tiny_tokens("llama_gqa")
    cache = cache_of(dense(ids[:, :8], use_cache=True))
    model(ids[:, 8:], **with_cache(model.forward, cache), use_cache=True)
    assert all(layer.keys.dtype == torch.int8 and layer.keys.shape[-2] == 12 for layer in cache.layers)


@torch.no_grad()
def test_a_cache_of_fixed_size_is_refused_with_the_way_out() -> None:
    model, ids = coded_model("llama_gqa"), tiny_tokens("llama_gqa")
    with pytest.raises(CompressError, match=r"kv_cache\.layer"):
        model(ids, **with_cache(model.forward, StaticCache(config=model.config, max_cache_len=32)), use_cache=True)


@torch.no_grad()
def test_a_skipped_block_stores_codes_too() -> None:
    model, ids = coded_model("llama_gqa"), tiny_tokens("llama_gqa")
    blocks = {i: SkipBlock(LinearPredictor(torch.zeros(64), 0.0), 0.0) for i in range(len(find_blocks(model)))}
    put_around(model, blocks)
    out = model(ids, use_cache=True)
    for block in blocks.values():
        block.threshold = float("inf")
    after = cache_of(model(ids[:, :1], **with_cache(model.forward, cache_of(out)), use_cache=True))
    assert all(layer.keys.shape[-2] == 13 and layer.keys.dtype == torch.int8 for layer in after.layers)


@pytest.mark.parametrize(("number", "scales"), FORMS)
@torch.no_grad()
def test_the_manifest_rebuilds_it_under_the_same_names(number: str, scales: str) -> None:
    model, ids = coded_model("gpt2", number, scales), tiny_tokens("gpt2")
    found = Manifest.from_json(changes(model, stock_model(model)).to_json())
    again = tiny_model("gpt2", seed=9)
    apply_manifest(again, found, torch.float32)
    again.load_state_dict(model.state_dict(), strict=True)
    again.tie_weights()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_caller_without_a_cache_gets_none_back() -> None:
    model, ids = coded_model("falcon"), tiny_tokens("falcon")
    assert cache_of(model(ids, use_cache=False)) is None
    assert isinstance(cache_of(model(ids, use_cache=True)), DynamicCache)
