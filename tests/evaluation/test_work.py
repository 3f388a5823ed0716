"""What a prefill computes and a decode step reads is counted on the operations that run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.scheme import named_scheme
from llmcompress.numerics.grid import round_to_codes
from llmcompress.numerics.ranges import fit
from llmcompress.runners.torch_runner import TorchRunner
from tests.families import FAMILIES, tiny_model

BATCH, CONTEXT = 2, 6
EXPERTS = {"mixtral", "qwen3_moe"}


def work(model: nn.Module):
    with TorchRunner(model) as runner:
        return runner.work(torch.arange(3, 3 + BATCH * CONTEXT).reshape(BATCH, CONTEXT))


def bytes_of(*modules: nn.Module) -> int:
    return sum(each.nbytes for module in modules for each in module.parameters())


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - EXPERTS))
def test_a_step_reads_every_weight_once_but_of_a_table_only_rows(family: str) -> None:
    model = tiny_model(family)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [each for each in model.modules() if isinstance(each, nn.Embedding) and each.weight is not head.weight]
    least = bytes_of(model) - bytes_of(*tables)
    rows = sum(BATCH * each.weight[0].nbytes for each in {*tables, embedding})
    buffers = sum(each.nbytes for each in model.buffers())
    assert least < work(model).weight_bytes <= least + rows + buffers


def test_of_experts_only_the_chosen_ones_are_read() -> None:
    model = tiny_model("mixtral")
    experts = sum(each.nbytes for name, each in model.named_parameters() if ".experts." in name)
    table = model.get_input_embeddings().weight
    with TorchRunner(model) as runner:
        one_token = runner.work(torch.tensor([[5, 6, 7]])).weight_bytes
    buffers = sum(each.nbytes for each in model.buffers())
    least = bytes_of(model) - table.nbytes - experts * 2 // 4
    assert least < one_token <= least + table[0].nbytes + buffers


@pytest.mark.parametrize(("family", "heads"), [("llama", 4), ("llama_gqa", 2), ("gpt2", 4), ("falcon_mqa", 1)])
def test_the_cache_holds_keys_and_values_of_the_prompt(family: str, heads: int) -> None:
    assert work(tiny_model(family)).cache_bytes == 3 * 2 * heads * (64 // 4) * 4 * BATCH * CONTEXT


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama_gqa", "phi", "mistral"])
def test_a_prefill_is_its_matrix_products(family: str, attention: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    head = model.get_output_embeddings()
    linears = [each for each in model.modules() if isinstance(each, nn.Linear) and each is not head]
    tokens = BATCH * CONTEXT
    products = 2 * tokens * sum(each.weight.numel() for each in linears) + 2 * BATCH * head.weight.numel()
    scores_and_values = 2 * (2 * BATCH * CONTEXT * CONTEXT * 64) * 3
    found = work(model).prefill_flops
    # rotary angles are an outer product too
    assert products + scores_and_values <= found <= products + scores_and_values + 2000


def test_weights_that_are_codes_count_as_codes() -> None:
    model = tiny_model("llama_gqa")
    dense = work(model).weight_bytes
    block = model.model.layers[0].mlp
    replaced = block.down_proj.weight
    scheme = named_scheme("int4_g32")
    fitted = fit(replaced, scheme.weights)
    coded = block.down_proj = QuantLinear.from_fitted(scheme, round_to_codes(replaced, fitted), fitted, None)
    assert dense - work(model).weight_bytes == replaced.nbytes - coded.codes_OI.nbytes - coded.scale_OG.nbytes
