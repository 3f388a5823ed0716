"""The inner loop of a run: every block once, every pass on it, finished blocks kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.calibration.stream import BlockStream
from llmcompress.evaluation.report import SiteReport
from llmcompress.model.map import ModelMap
from llmcompress.passes.base import BlockPass
from llmcompress.progress import Progress


class FinishedBlocks(Protocol):
    """Where finished blocks are kept, so that a killed run need not compute them again."""

    def finished_blocks(self) -> list[int]:
        """Indices from 0 on, without a gap."""

    def save_block(self, index: int, block: nn.Module, rows: list[SiteReport]) -> None:
        """Keep a block and its report."""

    def restore_block(self, index: int, block: nn.Module) -> list[SiteReport]:
        """Make the block what was kept, bit for bit; its report."""


def apply_passes(
    model: PreTrainedModel,
    model_map: ModelMap,
    passes: Sequence[BlockPass],
    windows_NT: Tensor,
    *,
    batch: int,
    device: torch.device,
    storage_dtype: torch.dtype,
    progress: Progress,
    keep: FinishedBlocks | None = None,
) -> list[SiteReport]:
    """Stream the model over the calibration windows and apply the passes to each block, top to bottom, in place.

    With `keep`, finished blocks are restored instead of computed, and every new one is kept. Without windows
    (0×T) nothing is measured and nothing is fed onward.
    """
    rows: list[SiteReport] = []
    finished = set(keep.finished_blocks()) if keep else set()
    stream = BlockStream(
        model,
        model_map,
        windows_NT,
        batch=batch,
        device=device,
        storage_dtype=storage_dtype,
        progress=progress,
    )
    for work in stream:
        index = work.info.index
        if keep and index in finished:
            block_rows = keep.restore_block(index, work.module)
        else:
            block_rows = [row for each in passes for row in each.run(work)]
            work.settle()
            if keep:
                keep.save_block(index, work.module, block_rows)
        rows += block_rows
        progress.step(f"block {index + 1}/{len(model_map.blocks)}")
    return rows
