"""Which directions SliceGPT keeps, found once more from hidden states and weights seen from outside."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.calibration.context import RunContext
from llmcompress.model.probe import map_model
from llmcompress.passes.apply import apply_passes
from llmcompress.passes.pruning.slicegpt import SliceGPT
from tests.families import HIDDEN, tiny_model
from tests.passes.test_laws import windows

READERS = 0.3
"""How much what is read counts beside what is there: a constant of the pass."""


@torch.no_grad()
def test_directions_kept_are_those_that_norms_see_and_readers_read_every_norm_alike() -> None:
    dense = tiny_model("llama", seed=1)
    sliced, _ = apply_passes(
        tiny_model("llama", seed=1), map_model(dense), (SliceGPT(fraction=0.25),), RunContext(windows(), batch=4)
    )
    readers = {"model.norm": [dense.lm_head]}
    for index, layer in enumerate(dense.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        readers[f"model.layers.{index}.input_layernorm"] = [attention.q_proj, attention.k_proj, attention.v_proj]
        readers[f"model.layers.{index}.post_attention_layernorm"] = [mlp.gate_proj, mlp.up_proj]
    seen: dict[str, Tensor] = {}
    for name in readers:
        dense.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    dense(windows())
    total = torch.zeros(HIDDEN, HIDDEN, dtype=torch.float64)
    for name, linears in readers.items():
        x = torch.nn.functional.normalize(seen[name].flatten(0, 1).double(), dim=-1)
        total += of_trace_one(x.T @ x)
        gain = dense.get_parameter(f"{name}.weight").double()
        read = torch.cat([linear.weight.double() * gain for linear in linears])
        total += READERS * of_trace_one(read.T @ read)
    kept = torch.linalg.eigh(total).eigenvectors[:, -48:]
    # embeddings of 128 tokens span all 64 directions, so what became of them tells what was kept
    found = torch.linalg.lstsq(dense.model.embed_tokens.weight.double(), sliced.model.embed_tokens.weight.double())
    basis = torch.linalg.qr(found.solution).Q
    torch.testing.assert_close(basis @ basis.T, kept @ kept.T, atol=1e-3, rtol=0)


def of_trace_one(matrix: Tensor) -> Tensor:
    return matrix / matrix.trace()
