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
from tests.families import FAMILIES, randomise, tiny_config, tiny_model, tiny_tokens
from tests.model.test_conform import assert_cache_is_right, assert_stock_computes_the_same
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
