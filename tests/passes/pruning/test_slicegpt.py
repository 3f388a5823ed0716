"""SliceGPT in both forms: exact when nothing is sliced, of the size that the formula says, refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmcompress.calibration.context import RunContext
from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.model.map import ModelMap
from llmcompress.model.probe import map_model
from llmcompress.model.residual_probe import find_residual
from llmcompress.model.stock import stock_model
from llmcompress.modules.manifest import changes
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.base import PASSES
from llmcompress.passes.pruning.slicegpt import SliceGPT
from llmcompress.records.rows import SiteReport
from tests.families import FAMILIES, VOCABULARY, randomise, tiny_config, tiny_model
from tests.reference.slicing import opt_with_shortcuts, parameters

REFUSED = {
    ("gemma2", "global"): "scales individual channels",
    ("gemma2", "shortcuts"): "scales individual channels",
    ("olmo2", "global"): "post-norm",
    ("olmo2", "shortcuts"): "post-norm",
    # experts are summed into a tensor of the shape of their input
    ("mixtral", "shortcuts"): "try `form: global`",
    ("qwen3_moe", "shortcuts"): "try `form: global`",
}
PLAIN = (
    "llama",
    "llama_gqa",
    "llama_odd",
    "mistral",
    "qwen2",
    "qwen3",
    "phi",
    "phi3",
    "cohere",
    "mixtral",
    "qwen3_moe",
)
"""Families whose config can say the size of a head."""

_maps: dict[str, ModelMap] = {}


def windows(count: int = 6, tokens: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(seed))


def sliced(
    family: str, *more: Any, model: PreTrainedModel | None = None, **options: Any
) -> tuple[PreTrainedModel, list[SiteReport]]:
    model = tiny_model(family, seed=1) if model is None else model
    if family not in _maps:
        _maps[family] = map_model(model)
    result = apply_passes(
        model,
        _maps[family],
        (SliceGPT(**options), *more),
        RunContext(windows(), batch=4),
    )
    return result.model, result.rows


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(windows(2, 16, seed=9)).logits


@pytest.mark.parametrize("form", ["global", "shortcuts"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_sliced_leaves_the_logits_or_is_refused_with_the_reason(family, form):
    if (family, form) in REFUSED:
        with pytest.raises(CompressError, match=REFUSED[family, form]):
            sliced(family, fraction=0.0, form=form)
        return
    dense = logits(tiny_model(family, seed=1))
    # a basis of its own at every place, far from the identity: every skip and every reader must undo another one
    for basis in ("pca", "random"):
        model, _ = sliced(family, fraction=0.0, form=form, basis=basis)
        torch.testing.assert_close(logits(model), dense, rtol=0, atol=1e-4 * float(dense.abs().max()))


@pytest.mark.parametrize("family", PLAIN)
def test_one_basis_gives_a_stock_model_with_a_plain_config(family):
    model, rows = sliced(family, fraction=0.25)
    text = model.config.get_text_config()
    width = 24 if family == "llama_odd" else 48  # 31 of 42, rounded down to a multiple of 8
    assert text.hidden_size == width
    assert not changes(model, stock_model(model))
    # everything is proportional to the width but biases of what reads, and norms inside attention
    dense = tiny_model(family, seed=1)
    head = model.get_output_embeddings().weight
    full = parameters(dense) + (
        head.shape[0] * tiny_config(family).hidden_size if dense.config.tie_word_embeddings else 0
    )
    fixed = sum(p.numel() for p in model.parameters() if not any(size == width for size in p.shape))
    assert parameters(model) - fixed == (full - fixed) * width // tiny_config(family).hidden_size
    assert rows[0].removed == tiny_config(family).hidden_size - width


def test_families_without_a_head_size_keep_their_config_and_describe_the_rest():
    for family in ("gpt2", "gpt_neox", "stablelm"):
        model, _ = sliced(family, fraction=0.25)
        assert model.config.hidden_size == 64
        assert changes(model, stock_model(model)).shapes
        assert torch.isfinite(logits(model)).all()


def test_embeddings_scaled_by_the_width_make_up_for_the_smaller_width():
    config = AutoConfig.for_model(
        "gemma",
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=96,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model, 0)
    dense = logits(model)
    before = find_residual(model).width
    small, _ = sliced(
        "gemma", model=model, fraction=0.01, round_to=1
    )  # one channel of random directions: hardly a loss
    assert (before, small.config.hidden_size) == (64, 63)
    assert not changes(small, stock_model(small))
    assert float((logits(small) - dense).abs().mean() / dense.abs().mean()) < 0.2


def opt(layers: int, **sizes: int) -> PreTrainedModel:
    config = AutoConfig.for_model("opt", num_hidden_layers=layers, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def test_shortcuts_have_the_parameters_of_the_papers_formula():
    sizes = {"vocabulary": 50272, "positions": 2048, "width": 768, "ffn": 3072, "layers": 12}
    assert opt_with_shortcuts(kept=608, **sizes) == 147_250_880  # the paper's program, OPT-125M at 20 %
    small = opt(
        3,
        vocab_size=VOCABULARY,
        max_position_embeddings=40,
        hidden_size=96,
        word_embed_proj_dim=96,
        ffn_dim=200,
        num_attention_heads=4,
    )
    randomise(small, 0)  # without a bias in the last norm the head would get none
    model, rows = sliced("opt-96", model=small, fraction=0.2, form="shortcuts")
    expected = opt_with_shortcuts(vocabulary=VOCABULARY, positions=40, width=96, kept=72, ffn=200, layers=3)
    assert parameters(model) == expected
    assert sum(row.parameters or 0 for row in rows) == expected  # norms have none


def test_rows_tell_what_every_part_has_lost():
    _, rows = sliced("llama", fraction=0.25, form="shortcuts")
    by_site = {row.site: row for row in rows}
    assert by_site["lm_head"].removed == 0  # as in the paper
    assert by_site["model.embed_tokens"].removed == by_site["model.layers.1"].removed == 16
    assert 0 < (by_site["model.layers.1"].score or 0) < 0.25  # principal directions lose less than their share
    assert set(by_site) == {"lm_head", "model.embed_tokens", *(f"model.layers.{i}" for i in range(3))}


@pytest.mark.parametrize("form", ["global", "shortcuts"])
def test_a_cache_changes_nothing_and_the_seed_decides(form):
    model, rows = sliced("llama_gqa", fraction=0.25, form=form)
    again, rows_again = sliced("llama_gqa", fraction=0.25, form=form)
    assert torch.equal(logits(model), logits(again)) and rows == rows_again
    prompt = windows(1, 6, seed=4)
    plain, cached = (model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=use) for use in (False, True))
    assert torch.equal(plain, cached)


@pytest.mark.parametrize("form", ["global", "shortcuts"])
def test_later_passes_quantize_the_smaller_linears(form):
    model, _ = sliced("llama_gqa", PASSES["rtn"](scheme="int8_channel"), fraction=0.25, form=form)
    quantized = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(quantized) == 3 * 7
    assert {module.in_features for module in quantized} == {48, 64, 96}
    only_sliced, _ = sliced("llama_gqa", fraction=0.25, form=form)
    near = 0.1 * float(logits(only_sliced).abs().max())
    torch.testing.assert_close(logits(model), logits(only_sliced), rtol=0, atol=near)


def test_a_random_basis_needs_no_text():
    assert not SliceGPT(basis="random", refit=False).uses_data()
    assert not SliceGPT(basis="random", form="shortcuts").uses_data()
    assert SliceGPT(basis="random").uses_data() and SliceGPT().uses_data() and SliceGPT(form="shortcuts").uses_data()
    model = tiny_model("llama", seed=1)
    whole = WholeModel(
        model,
        map_model(model),
        RunContext(torch.zeros(0, 8, dtype=torch.long), batch=1),
    )
    for form in ("global", "shortcuts"):
        fresh = tiny_model("llama", seed=1)
        whole.replace_model(fresh)
        SliceGPT(basis="random", form=form, **({"refit": False} if form == "global" else {})).apply(whole)
        assert fresh.get_input_embeddings().weight.shape[1] == 48


def test_what_cannot_be_is_refused():
    with pytest.raises(CompressError, match="round_to"):
        sliced("llama", fraction=0.95)
    with pytest.raises(ValidationError, match="apply to `form: global`"):
        SliceGPT(form="shortcuts", refit=False)
    assert (
        SliceGPT().conflict_with("zeros") and SliceGPT().conflict_with("pattern") and SliceGPT().conflict_with("codes")
    )
    assert SliceGPT().conflict_with("shapes") is None
