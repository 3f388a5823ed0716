"""The pass around the wrapper: every family, after other passes, saved, reloaded and refused where it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config

from llmcompress.calibration.context import RunContext
from llmcompress.errors import CompressError
from llmcompress.evaluation.footprint import footprint
from llmcompress.exporters.save import save_model
from llmcompress.model.probe import map_model
from llmcompress.modules.cache_names import cache_of
from llmcompress.modules.kv_cache import CodedAttention
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES
from llmcompress.recipe import parse_recipe
from llmcompress.run import Run
from tests.exporters.test_manifest import in_fresh_process
from tests.families import FAMILIES, VOCABULARY, tiny_model, tiny_tokens
from tests.passes.test_laws import map_of
from tests.warm_python import WarmPython

WINDOWS = torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))


def apply(family: str, passes: str, **options: Any) -> Any:
    model = tiny_model(family, seed=1)
    return apply_passes(
        model,
        map_of(family, model),
        parse_recipe(f"passes: {passes}", "test").passes,
        RunContext(WINDOWS, batch=4, storage_dtype=options.pop("storage_dtype", torch.float32), **options),
    )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_stores_codes_and_hardly_moves(family: str) -> None:
    dense = tiny_model(family, seed=1)(WINDOWS).logits
    for options, limit in (("dtype: int8", 0.01), ("dtype: int8, scales: channel", 0.01), ("dtype: fp8", 0.05)):
        model, rows = apply(family, f"[{{kv_cache: {{{options}}}}}]")
        wrappers = {name for name, part in model.named_modules() if isinstance(part, CodedAttention)}
        assert {row.site for row in rows} == wrappers and len(rows) == model.config.num_hidden_layers
        # the median: where experts are routed, a token that goes elsewhere moves its logits by any amount
        assert (model(WINDOWS, use_cache=False).logits - dense).abs().median() < limit * dense.abs().max()
        if "channel" not in options:
            assert all(row.tokens is None for row in rows)


@torch.no_grad()
def test_fixed_scales_cover_the_calibration_text_exactly() -> None:
    model, rows = apply("llama_gqa", "[{kv_cache: {dtype: int8, scales: channel}}]")
    assert all(row.tokens == WINDOWS.numel() for row in rows)
    layer = cache_of(tiny_model("llama_gqa", seed=1)(WINDOWS, use_cache=True)).layers[0]
    wrapper = model.model.layers[0].self_attn
    for scale, cached in ((wrapper.key_scale, layer.keys), (wrapper.value_scale, layer.values)):
        torch.testing.assert_close(scale, (cached.abs().amax((0, 2)) / 127)[:, None], rtol=2**-8, atol=0)
    assert wrapper.key_scale.shape == (2, 1, 16) and wrapper.bytes_per_token == 2 * 2 * 16


def test_rows_tell_bytes_per_token_in_the_stored_type() -> None:
    _, rows = apply("qwen3", "[{kv_cache: {}}]", storage_dtype=torch.bfloat16)
    assert [(row.cache_bytes_before, row.cache_bytes) for row in rows] == [(2 * 2 * 24 * 2, 2 * 2 * 26)] * 3


def test_a_model_whose_cached_decode_computes_something_else_is_refused() -> None:
    model = tiny_model("llama_gqa", seed=1)
    # a token that comes alone is a decode
    model.lm_head.register_forward_hook(lambda _, given, out: out * (-1 if given[0].shape[1] == 1 else 1))
    passes = parse_recipe("passes: [{kv_cache: {}}]", "test").passes
    with pytest.raises(CompressError) as refused:
        apply_passes(model, map_of("llama_gqa", tiny_model("llama_gqa", seed=1)), passes, RunContext(WINDOWS))
    assert refused.value.code == "kv_cache.differs"


CASES = {
    "int8": ("llama_gqa", "[{kv_cache: {}}]"),
    "fp8, fixed": ("gpt2", "[{kv_cache: {dtype: fp8, scales: tensor}}]"),
    "after codes": ("mistral", "[{rtn: {scheme: int4_g32}}, {kv_cache: {}}]"),
    "after codes with biases": ("opt", "[{rtn: {scheme: int4_g32}}, {kv_cache: {dtype: fp8}}]"),
    "after factors": ("llama_gqa", "[{svd: {fraction: 0.2}}, {kv_cache: {scales: channel}}]"),
    "beside skipping": ("llama_gqa", "[{kv_cache: {}}, {layer_skip: {skip: 0.3}}]"),
    "experts": ("mixtral", "[{kv_cache: {dtype: int8}}]"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, folders = tmp_path_factory.mktemp("cache"), {}
    for number, (name, (family, passes)) in enumerate(CASES.items()):
        model, folder = apply(family, passes).model, root / str(number)
        save_model(model, folder, "auto", storage_dtype=torch.float32, max_shard_size="5GB")
        ids = tiny_tokens(family)
        torch.save(ids, folder / "ids.pt")
        with torch.no_grad():
            new = model.generate(ids[:1, :6], max_new_tokens=6, min_new_tokens=6, do_sample=False)
            torch.save((model(ids).logits, new), root / f"{number}.pt")
        folders[name] = folder
    return folders


def test_a_process_that_only_imported_us_computes_and_generates_the_same(
    saved: dict[str, Path], stock_python: WarmPython
) -> None:
    assert in_fresh_process(stock_python, list(saved.values()), "import llmcompress") == ["loaded"] * len(saved)
    for name, folder in saved.items():
        logits, new = torch.load(folder.with_suffix(".pt"))
        assert torch.equal(torch.load(folder / "logits.pt"), logits), name
        assert torch.equal(torch.load(folder / "new.pt"), new), name


def test_a_plain_loader_refuses_loudly(saved: dict[str, Path], stock_python: WarmPython) -> None:
    assert in_fresh_process(stock_python, list(saved.values()), "") == ["refused RuntimeError"] * len(saved)


IN_STOCK_WORDS = {
    "fp8": ("llama_gqa", "[{kv_cache: {dtype: fp8, scales: tensor}}]"),
    "int8 with biases": ("qwen2", "[{kv_cache: {scales: tensor}}]"),
    "after codes": ("qwen3", "[{rtn: {scheme: int4_g32}}, {kv_cache: {dtype: fp8, scales: tensor}}]"),
    "sliding windows": ("gemma2", "[{kv_cache: {scales: tensor}}]"),
}


def library_rounds_caches_of(family: str) -> bool:
    """Asked of compressed-tensors itself: up to 0.20.1 it does not see the caches of transformers 5.24 and later."""
    stock = tiny_model(family, seed=1)
    scheme = QuantizationArgs(num_bits=8, strategy="tensor", dynamic=False, symmetric=True)
    apply_quantization_config(stock, QuantizationConfig(config_groups={}, kv_cache_scheme=scheme))
    return any(name.endswith("k_scale") for name, _ in stock.named_parameters())


@pytest.mark.parametrize("case", IN_STOCK_WORDS)
def test_one_scale_for_keys_and_one_for_values_is_compressed_tensors(
    tmp_path: Path, case: str, stock_python: WarmPython
) -> None:
    family, passes = IN_STOCK_WORDS[case]
    model, ids = apply(family, passes).model, tiny_tokens(family)
    wrappers = [name for name, part in model.named_modules() if isinstance(part, CodedAttention)]
    saved = save_model(model, tmp_path, "auto", storage_dtype=torch.float32, max_shard_size="5GB")
    stock = library_rounds_caches_of(family)
    assert saved.format == ("compressed-tensors" if stock else "llmcompress")
    assert [name for name, part in model.named_modules() if isinstance(part, CodedAttention)] == wrappers
    torch.save(ids, tmp_path / "ids.pt")
    assert in_fresh_process(stock_python, [tmp_path], "" if stock else "import llmcompress") == ["loaded"]
    with torch.no_grad():
        # the library's rounding multiplies in another order: a number next to a boundary goes the other way
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(ids).logits, atol=2e-3, rtol=0)
        new = model.generate(ids[:1, :6], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(torch.load(tmp_path / "new.pt"), new)
    size = footprint(tmp_path)
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
    assert size.cache_bytes_per_token == len(wrappers) * 2 * heads * head
    if "rtn" not in passes:
        dense = tiny_model(family, seed=1)
        assert size.parameters == sum(part.numel() for part in dense.parameters())


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_attentions_that_the_library_does_not_know_keep_our_manifest(tmp_path: Path, family: str) -> None:
    model = apply(family, "[{kv_cache: {scales: tensor}}]").model
    saved = save_model(model, tmp_path, "auto", storage_dtype=torch.float32, max_shard_size="5GB")
    assert saved.format == "llmcompress"


def test_our_format_stores_codes_in_transformers_too(tmp_path: Path) -> None:
    model = apply("llama_gqa", "[{kv_cache: {dtype: fp8, scales: tensor}}]").model
    saved = save_model(model, tmp_path, "llmcompress", storage_dtype=torch.float32, max_shard_size="5GB")
    assert saved.format == "llmcompress" and footprint(tmp_path).cache_bytes_per_token == 3 * 2 * 2 * 16


def test_footprint_tells_the_cache_of_a_token(saved: dict[str, Path]) -> None:
    assert footprint(saved["int8"]).cache_bytes_per_token == 3 * 2 * 2 * (16 + 2)
    assert footprint(saved["fp8, fixed"]).cache_bytes_per_token == 3 * 2 * 4 * 16
    assert footprint(saved["beside skipping"]).cache_bytes_per_token == 3 * 2 * 2 * (16 + 2)


@pytest.mark.parametrize("wanted", ["plain", "compressed-tensors"])
def test_stock_formats_are_refused(tmp_path: Path, wanted: Any) -> None:
    model = apply("llama_gqa", "[{kv_cache: {}}]").model
    with pytest.raises(CompressError) as refused:
        save_model(model, tmp_path, wanted, storage_dtype=torch.float32, max_shard_size="5GB")
    assert "auto" in refused.value.fix


LATER = ["gptq: {scheme: int4_g32}", "svd: {fraction: 0.2}", "kv_cache: {}", "depth: {count: 1}"]


@pytest.mark.parametrize("later", LATER)
def test_only_what_leaves_the_attention_alone_may_follow(later: str) -> None:
    with pytest.raises(CompressError, match=r"recipe\.order") as refused:
        parse_recipe(f"passes: [{{kv_cache: {{}}}}, {{{later}}}]", "test")
    assert "cache" in refused.value.what or "codes" in refused.value.what


def test_a_killed_run_goes_on_behind_it_bit_for_bit(tmp_path: Path) -> None:
    def run() -> Any:
        with Run.open(tmp_path / "out", fingerprint={}, lock_text="", fresh=False) as kept:
            return apply("llama_gqa", "[{kv_cache: {scales: channel}}]", keep=kept)

    first, again = run(), run()
    assert again.rows == first.rows
    with torch.no_grad():
        assert torch.equal(again.model(WINDOWS).logits, first.model(WINDOWS).logits)


def test_a_model_without_such_a_cache_is_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("rwkv", vocab_size=64, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    from llmcompress.model.cache_users import cache_users

    with pytest.raises(CompressError, match=r"kv_cache\.none"):
        cache_users(model, torch.arange(3, 8)[None])


def test_it_needs_data_only_for_fixed_scales() -> None:
    assert not PASSES["kv_cache"]().uses_data() and PASSES["kv_cache"](scales="tensor").uses_data()
    assert map_model(apply("llama_gqa", "[{kv_cache: {}}]").model).blocks
