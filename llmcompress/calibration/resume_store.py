"""The interface of what is saved during a run, so that an interrupted run can resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.records.rows import SiteReport


class ResumeStore(Protocol):
    """Blocks, decisions and whole models by stage; everything is restored bit for bit."""

    def finished_blocks(self, stage: int) -> list[int]:
        """Indices of the blocks that a stage has finished: 0, 1, … without a gap."""

    def save_block(self, stage: int, index: int, block: nn.Module, before: nn.Module, rows: list[SiteReport]) -> None:
        """Save a block and its report rows; `before` is its meta copy from before the stage."""

    def restore_block(self, stage: int, index: int, block: nn.Module) -> list[SiteReport]:
        """Restore the block bit for bit; returns its report rows."""

    def block_state(self, stage: int, index: int) -> Mapping[str, Tensor]:
        """Every tensor of a saved block, memory-mapped."""

    def decisions(self, stage: int) -> dict[str, Tensor] | None:
        """The saved decisions of the stage's passes, if any."""

    def save_decisions(self, stage: int, decisions: Mapping[str, Tensor]) -> None:
        """Keep it."""

    def measurement(self, name: str) -> tuple[Mapping[str, Tensor], Mapping[str, Any]] | None:
        """The saved measurement of that name, if any: tensors and metadata."""

    def save_measurement(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Save it; names consist of letters, digits, `-` and `.`."""

    def finished_model(self) -> int | None:
        """The last stage after which the whole model was saved."""

    def save_model(self, stage: int, model: PreTrainedModel, rows: list[SiteReport]) -> None:
        """Save the whole model and all report rows so far."""

    def restore_model(self, stage: int, model: PreTrainedModel) -> tuple[PreTrainedModel, list[SiteReport]]:
        """The model saved after that stage, and the report rows; `model` is the original one."""

    def training_file(self, stage: int, name: str) -> Path:
        """The file in which a training saves its state until its stage is finished."""
