"""What embedding and head weigh where no stock format rounds them: of small models half of the files."""

from __future__ import annotations

from math import prod

import torch

from llmcompress.exporters.choose import Choice
from llmcompress.formats.named import Kind
from llmcompress.model.map import ModelMap

_MUCH = 0.1
"""Of the files, that tables must be before anybody is told that they stay dense."""


def dense_tables(choice: Choice, model_map: ModelMap, dtype: torch.dtype) -> list[str]:
    """Which share of the files embedding and head are, where they stay dense beside codes and that is much."""
    contents = choice.contents
    if not contents.sites or contents.rounded_embedding is not None:
        return []
    coded = {site.name: site for site in contents.sites}
    blocks = sum(
        sum(map(bytes_of, choice.tensors(coded[name], dtype).values()))
        if (name := block.full(site.name)) in coded
        else site.outputs * site.inputs * dtype.itemsize
        for block in model_map.blocks
        for site in block.structure.sites
    )
    tables = (1 if model_map.tied else 2) * model_map.vocabulary * model_map.hidden_size * dtype.itemsize
    if tables < _MUCH * (blocks + tables):
        return []
    what = "the embedding, which is the head too, stays" if model_map.tied else "embedding and head stay"
    return [
        f"{what} in {8 * dtype.itemsize} bits: {tables / 1e6:.0f} MB of {(blocks + tables) / 1e6:.0f} MB "
        f"({tables / (blocks + tables):.0%} of the files). Stock loaders cannot read quantized embeddings; a recipe "
        "with `embeddings` and `save.format: llmcompress` stores them in 8 bits"
    ]


def bytes_of(kind: Kind) -> int:
    """Of a tensor that is not there yet."""
    dtype, shape = kind
    return prod(shape) * dtype.itemsize
