"""Writes a finished model with the exporter chosen for it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmcompress.calibration.offloading import InMemory, WeightStore
from llmcompress.exporters.base import Saved, Writing
from llmcompress.exporters.choose import Format, choose
from llmcompress.exporters.contents import contents_in
from llmcompress.formats.compressed_tensors import ZeroPoints


def save_model(
    model: PreTrainedModel,
    folder: Path,
    wanted: Format,
    *,
    storage_dtype: torch.dtype,
    max_shard_size: str = "5GB",
    zero_points: ZeroPoints = "folded",
    weights_at: WeightStore | None = None,
) -> Saved:
    """Write an ordinary Hugging Face folder, block after block; the model is not changed, its weights are offloaded.

    Raises: CompressError when `wanted` cannot hold the model.
    """
    saved = "all finished blocks: run again with another format"
    chosen = choose(wanted, contents_in(model, storage_dtype), zero_points=zero_points, saved=saved)
    return chosen.exporter.write(model, folder, Writing(storage_dtype, max_shard_size, weights_at or InMemory()))
