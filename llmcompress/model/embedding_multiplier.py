"""The factor by which an embedding multiplies the rows that it looks up."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from llmcompress.errors import CompressError


@torch.no_grad()
def embedding_multiplier(model: PreTrainedModel, embedding: nn.Embedding) -> float:
    """What the embedding's class multiplies its rows by; found by looking some up.

    Raises: CompressError when it does something else with them.
    """
    ids = torch.arange(min(8, embedding.num_embeddings), device=embedding.weight.device)
    rows, seen = embedding.weight[ids].float(), embedding(ids).float()
    scale = float((rows * seen).sum() / rows.square().sum()) if bool(rows.any()) else 1.0
    if not torch.allclose(seen, scale * rows, rtol=2e-2, atol=1e-3 * float(seen.abs().max())):
        raise CompressError(
            "embedding.unknown",
            f"{type(embedding).__name__} does more than look up rows and scale them",
            where=type(model).__name__,
            fix="leave the embedding of this model dense",
        )
    return 1.0 if torch.equal(seen, rows) else scale
