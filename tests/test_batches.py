"""Batches with left padding: every kind of compressed model gives each text what it gives it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from llmcompress.calibration.context import RunContext
from llmcompress.model.experts import unfuse_experts
from llmcompress.model.probe import map_model
from llmcompress.modules.base import MODULES
from llmcompress.passes.apply import apply_passes
from llmcompress.recipe import parse_recipe
from llmcompress.runners.torch_runner import TorchRunner
from tests.families import VOCABULARY, tiny_model

WINDOWS = torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))
LENGTHS = (3, 11, 7)
TEXTS = [WINDOWS[row, :length].tolist() for row, length in enumerate(LENGTHS)]
PADDING = 0

NOT_HERE = {"unfused_experts"} if transformers.__version__.startswith("4.") else set[str]()
"""There, experts are linears from the start."""

RECIPES = {
    "codes": ("llama_gqa", "{rtn: {scheme: int4_g32_asym}}", "quant_linear"),
    "codes, activations per token": ("gpt2", "{rtn: {scheme: int8_channel_a8token}}", "quant_linear"),
    "static activations": ("llama_gqa", "{rtn: {scheme: int8_channel_a8tensor}}", "quant_linear"),
    "tables": (
        "llama_gqa",
        "{embeddings: {embedding: int8_channel, head: int8_channel}}",
        "quant_embedding shared_head",
    ),
    "learned tables": ("llama", "{cmpq: {bits: 3.5}}", "codebook_linear"),
    # not int8: bitsandbytes takes a column out of the integers when any token of the batch is large there
    "bitsandbytes": ("llama", "{bnb_nf4: {exclude: '*.down_proj'}}", "bnb_linear"),
    "factors": ("llama", "{svd: {fraction: 0.3}}", "low_rank"),
    "factors beside codes": (
        "llama",
        "{low_rank_correction: {quantizer: {rtn: {scheme: int3_g32}}, rank: 4}}",
        "corrected quant_linear",
    ),
    "tensor trains": ("llama", "{tensor_train: {sites: '*.mlp.*', fraction: 0.3}}", "tensor_train"),
    "tensor trains of tables": (
        "llama_gqa",
        "{tensorgpt: {rank: 1, head: share}}",
        "tensor_train_embedding tensor_train_head",
    ),
    "shared factors of heads": ("llama", "{tucker: {sites: '*.self_attn.*', fraction: 0.1}}", "tucker"),
    "chosen rows and columns": ("llama", "{modegpt: {fraction: 0.25}}", "selected_rows selected_columns"),
    "rotated inputs": ("llama", "{rotation: {online: true}}", "rotated_input"),
    "clustered inputs": ("llama", "{reorder: {clusters: 4, bits: 8}}", "clustered_input"),
    "shortcuts": ("llama", "{slicegpt: {fraction: 0.25, form: shortcuts}}", "segment_norm segment shortcuts"),
    "shortcuts after a norm of the embedding": (
        "bloom",
        "{slicegpt: {fraction: 0.25, form: shortcuts}}",
        "pass_through",
    ),
    "one basis": ("llama", "{slicegpt: {fraction: 0.25, form: global}}", ""),
    "layers of other widths": (
        "llama_gqa",
        "{width: {fraction: 0.2, score: fluctuation, allocation: global, floor: 0.3, refit: bias}}",
        "",
    ),
    "fewer layers": ("opt", "{depth: {count: 1}}", ""),
    "cache in codes": ("llama_gqa", "{kv_cache: {dtype: int8, scales: token}}", "coded_cache"),
    "cache in codes, static": ("mistral", "{kv_cache: {dtype: fp8, scales: channel}}", "coded_cache"),
    "small activations left out": (
        "llama",
        "{activation_sparsity: {sparsity: 0.4, inputs: all}}",
        "thresholded_linear",
    ),
    "early exit": ("llama", "{early_exit: {agreement: 0.5, jump: true}}", "exit_block"),
    "skipped layers": ("llama", "{layer_skip: {skip: 0.3}}", "skip_block"),
    "experts": ("mixtral", "{rtn: {scheme: int4_g32}}", "unfused_experts quant_linear"),
}
"""Family, pass, and the kinds of modules that it makes: one for every kind, on families of several sorts."""


def compressed(recipe: str) -> Any:
    family, text, _ = RECIPES[recipe]
    model = tiny_model(family, seed=1)
    unfuse_experts(model)
    passes = parse_recipe(f"passes: [{text}]", "test").passes
    model, _ = apply_passes(model, map_model(model), passes, RunContext(WINDOWS, batch=3))
    if not model._supports_sdpa:
        return model
    # in float64 sums in another order do not push a rounded activation over a border; the plain formula for attention
    # masks with the least float64 and then computes in float32, where that is -Inf
    model.set_attn_implementation("sdpa")
    return model.double()


def kinds(model: Any) -> set[str]:
    registered = {MODULES[name]: name for name in MODULES}
    return {registered[type(module)] for module in model.modules() if type(module) in registered}


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_a_text_in_a_padded_batch_gets_what_it_gets_alone(recipe: str) -> None:
    model = compressed(recipe)
    assert kinds(model) >= set(RECIPES[recipe][2].split()) - NOT_HERE
    longest = max(LENGTHS)
    ids_BT = torch.tensor([[PADDING] * (longest - len(text)) + text for text in TEXTS])
    mask_BT = torch.tensor([[0] * (longest - length) + [1] * length for length in LENGTHS])
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    batched = model(ids_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=False).logits
    for row, text in enumerate(TEXTS):
        alone = model(torch.tensor([text]), use_cache=False).logits[0]
        torch.testing.assert_close(batched[row, -len(text) :], alone, rtol=0, atol=2e-5 * float(alone.abs().max()))
    with TorchRunner(model) as runner:
        together = runner.generate(TEXTS, max_new_tokens=5)
        assert together == [runner.generate([text], max_new_tokens=5)[0] for text in TEXTS]


def test_every_kind_of_module_is_among_them() -> None:
    assert {kind for *_, made in RECIPES.values() for kind in made.split()} == set(MODULES)
