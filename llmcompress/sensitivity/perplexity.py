"""Perplexity on the calibration windows, with the logits of a few rows at a time."""

from __future__ import annotations

import math

import torch

from llmcompress.calibration.whole import WholeModel
from llmcompress.errors import CompressError
from llmcompress.sensitivity.gradients import rows_at_once, summed_loss
from llmcompress.training import head


@torch.no_grad()
def perplexity(whole: WholeModel) -> float:
    """Over all calibration windows, of the whole model.

    Raises: CompressError when it is not a number: the model overflows.
    """
    windows_NT = whole.context.windows_NT
    total = 0.0
    with whole.resident() as model:
        rows = rows_at_once(model.config.get_text_config().vocab_size)
        first_NT = windows_NT[: whole.context.batch].to(whole.context.device)
        found = head.find_head(model, first_NT) if first_NT.numel() > rows else None
        for ids_BT in whole.batches():
            total += float(summed_loss(model, ids_BT, found, rows))
    if not math.isfinite(total):
        raise CompressError(
            "numerics.not-finite",
            "the model computes NaN or Inf on the calibration data",
            fix="check the checkpoint with a plain forward pass; try another calibration text",
        )
    return math.exp(min(total / max(len(windows_NT), 1), 80.0))
