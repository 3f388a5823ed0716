"""Folds a norm right after the embedding, as in BLOOM, into the embedding's rows."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from llmcompress.model.norms import normalises
from llmcompress.model.rotation import few_tokens, untie
from llmcompress.model.skeleton import find_blocks, put_module, record
from llmcompress.modules.residual import PassThrough


@torch.no_grad()
def bake_embedding_norm(model: PreTrainedModel) -> None:
    """Where there is one, every row of the embedding becomes what the norm makes of it, and the norm is gone; exact.

    The model is in float32. Gains that single channels of the stream get from a norm would forbid another basis.
    """
    blocks = find_blocks(model)
    embedding = model.get_input_embeddings()
    ids_BT = few_tokens(model).to(embedding.weight.device)
    rows, entering = embedding(ids_BT), record(model, blocks, ids_BT).hidden
    for name, module in list(model.named_modules()):
        if name.startswith(tuple(f"{block}." for block, _ in blocks)) or any(module.children()) or module is embedding:
            continue
        if _gives(module, rows, entering):
            untie(model)
            for part_VD in embedding.weight.split(4096):
                part_VD.copy_(module(part_VD))
            put_module(model, name, PassThrough(rows.shape[-1]))
            return


def _gives(module: nn.Module, rows: torch.Tensor, entering: torch.Tensor) -> bool:
    """Whether the module is a norm that makes of the embedding's rows exactly what the first block gets."""
    if not isinstance(getattr(module, "weight", None), torch.Tensor) or module.weight.shape != rows.shape[-1:]:
        return False
    output = module(rows)
    return normalises(module, rows, output, rows.shape[-1]) and torch.allclose(output, entering, rtol=1e-4, atol=1e-5)
