"""Chooses how a finished model is stored: plain, compressed-tensors, or our manifest where neither has words for it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmcompress.errors import CompressError
from llmcompress.export.base import Format, Saved, ZeroPoints
from llmcompress.export.compressed_tensors import save_compressed_tensors
from llmcompress.export.manifest import save_with_manifest
from llmcompress.export.plain import save_plain
from llmcompress.model.stock import stock_outline
from llmcompress.modules.manifest import changes


def save_model(
    model: PreTrainedModel,
    folder: Path,
    wanted: Format,
    *,
    storage_dtype: torch.dtype,
    max_shard_size: str,
    zero_points: ZeroPoints = "folded",
) -> Saved:
    """Write an ordinary Hugging Face folder; the model is not changed.

    Raises: CompressError when `wanted` cannot hold the model.
    """
    found = changes(model, stock_outline(model))
    if wanted == "plain":
        return save_plain(model, folder, storage_dtype=storage_dtype, max_shard_size=max_shard_size)
    if not found.needs_plugin:
        return save_compressed_tensors(
            model, folder, storage_dtype=storage_dtype, max_shard_size=max_shard_size, zero_points=zero_points
        )
    if wanted == "compressed-tensors":
        raise CompressError(
            "save.format",
            "compressed-tensors has no words for this model: it is more than quantized",
            where=next(iter([*found.modules, *found.shapes, *found.attributes])),
            fix="set `save.format` to auto: the folder then loads after `import llmcompress`",
            saved="all finished work: run again with another format",
        )
    return save_with_manifest(model, folder, found, storage_dtype=storage_dtype, max_shard_size=max_shard_size)
