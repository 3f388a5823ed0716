"""Adapters added to quantized weights, which are rounded again: what that costs is measured and told."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from llmcompress.calibration.whole import WholeModel
from llmcompress.model.site import LinearSite
from llmcompress.modules.base import CompressedModule

_WINDOWS = 16
"""On which the loss is compared; held-out ones where there are some."""


@torch.no_grad()
def mean_loss(whole: WholeModel) -> float:
    """In nats per token, on a few windows; the model must be resident."""
    context = whole.context
    windows_NT = (context.windows_NT if context.held_out_NT is None else context.held_out_NT)[:_WINDOWS]
    losses = [(float(whole.loss(ids_BT)), len(ids_BT)) for ids_BT in whole.batches(windows_NT)]
    return sum(loss * count for loss, count in losses) / max(sum(count for _, count in losses), 1)


@torch.no_grad()
def requantized(whole: WholeModel, bases: Mapping[LinearSite, nn.Module], *, title: str, first: float) -> str | None:
    """Every site is again the kind of module that it was, with codes of the sum; why that did harm, if it did.

    `bases` are the modules from before the training, when the loss was `first`.

    Raises: CompressError where a module cannot be rounded again.
    """
    apart = mean_loss(whole)
    for site, base in bases.items():
        assert isinstance(base, CompressedModule), "only those get a branch"
        site.replace(base.requantized(site.weight_OI, site.storage_dtype))
    merged = mean_loss(whole)
    told = f"loss {first:.4f} before training, {apart:.4f} with adapters apart, {merged:.4f} merged and rounded again"
    whole.context.progress.note(f"{title}: {told}")
    return f"merging lost more than training gained: {told}" if merged > first else None
