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

RECIPES = {
    "codes": ("llama_gqa", "{rtn: {scheme: int4_g32_asym}}"),
    "codes, activations per token": ("gpt2", "{rtn: {scheme: int8_channel_a8token}}"),
    "static activations": ("llama_gqa", "{rtn: {scheme: int8_channel_a8tensor}}"),
    "tables": ("llama_gqa", "{embeddings: {embedding: int8_channel, head: int8_channel}}"),
    "learned tables": ("llama", "{cmpq: {bits: 3.5}}"),
    "bitsandbytes": ("llama", "{bnb_int8: {}}"),
    "factors": ("llama", "{svd: {ratio: 0.3}}"),
    "factors beside codes": ("llama", "{low_rank_correction: {quantizer: {rtn: {scheme: int3_g32}}, rank: 4}}"),
    "tensor trains": ("llama", "{tensor_train: {sites: '*.mlp.*', ratio: 0.3}}"),
    "tensor trains of tables": ("llama_gqa", "{tensorgpt: {ratio: 0.1, head: true}}"),
    "shared factors of heads": ("llama", "{tucker: {sites: '*.self_attn.*', ratio: 0.1}}"),
    "chosen rows and columns": ("llama", "{modegpt: {ratio: 0.25}}"),
    "rotated inputs": ("llama", "{rotation: {online: true}}"),
    "clustered inputs": ("llama", "{reorder: {clusters: 4, bits: 8}}"),
    "shortcuts": ("llama", "{slicegpt: {ratio: 0.25, form: shortcuts}}"),
    "shortcuts of a scaled embedding": ("gemma2", "{slicegpt: {ratio: 0.25, form: shortcuts}}"),
    "one basis": ("llama", "{slicegpt: {ratio: 0.25, form: global}}"),
    "layers of other widths": (
        "llama_gqa",
        "{width: {ratio: 0.2, score: fluctuation, allocation: global, floor: 0.3, refit: bias}}",
    ),
    "fewer layers": ("opt", "{depth: {remove: 1}}"),
    "cache in codes": ("llama_gqa", "{kv_cache: {dtype: int8, scales: token}}"),
    "cache in codes, static": ("mistral", "{kv_cache: {dtype: fp8, scales: channel}}"),
    "small activations left out": ("llama", "{activation_sparsity: {sparsity: 0.4, inputs: all}}"),
    "early exit": ("llama", "{early_exit: {agreement: 0.5, jump: true}}"),
    "skipped layers": ("llama", "{layer_skip: {skip: 0.3}}"),
    "experts": ("mixtral", "{rtn: {scheme: int4_g32}}"),
}
"""One for every kind of module, on families with other positions, attention and tying."""


def compressed(recipe: str) -> Any:
    family, text = RECIPES[recipe]
    model = tiny_model(family, seed=1)
    unfuse_experts(model)
    passes = parse_recipe(f"passes: [{text}]", "test").passes
    return apply_passes(model, map_model(model), passes, RunContext(WINDOWS, batch=3))[0]


def kinds(model: Any) -> set[str]:
    registered = {MODULES[name]: name for name in MODULES}
    return {registered[type(module)] for module in model.modules() if type(module) in registered}


_seen: dict[str, set[str]] = {}


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_a_text_in_a_padded_batch_gets_what_it_gets_alone(recipe: str) -> None:
    model = compressed(recipe)
    _seen[recipe] = kinds(model)
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


def test_every_kind_of_module_was_among_them() -> None:
    if set(_seen) != set(RECIPES):
        pytest.skip("only a part of the recipes ran in this process")
    found = set().union(*_seen.values())
    expected = set(MODULES) - ({"unfused_experts"} if transformers.__version__.startswith("4.") else set())
    assert found == expected
