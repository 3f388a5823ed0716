"""Where finished work is kept, so that a killed run need not compute it again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.records.rows import SiteReport


class ResumeStore(Protocol):
    """Blocks, decisions and whole models by stage; what was saved comes back bit for bit."""

    def finished_blocks(self, stage: int) -> list[int]:
        """Indices of the blocks that a stage has done, from 0 on, without a gap."""

    def save_block(self, stage: int, index: int, block: nn.Module, before: nn.Module, rows: list[SiteReport]) -> None:
        """Keep a block and its report; `before` is its outline from before the stage."""

    def restore_block(self, stage: int, index: int, block: nn.Module) -> list[SiteReport]:
        """Make the block what was kept, bit for bit; its report."""

    def block_state(self, stage: int, index: int) -> Mapping[str, Tensor]:
        """Every tensor of a kept block, mapped from its file."""

    def decisions(self, stage: int) -> dict[str, Tensor] | None:
        """What the stage's passes decided, if they have."""

    def save_decisions(self, stage: int, decisions: Mapping[str, Tensor]) -> None:
        """Keep it."""

    def measurement(self, name: str) -> tuple[Mapping[str, Tensor], Mapping[str, Any]] | None:
        """What was measured under that name, if it was: its tensors, and what they do not say."""

    def save_measurement(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keep it; a name is letters, digits, `-` and `.`."""

    def finished_model(self) -> int | None:
        """The last stage after which the whole model was kept."""

    def save_model(self, stage: int, model: PreTrainedModel, rows: list[SiteReport]) -> None:
        """Keep the whole model and all report rows up to here."""

    def restore_model(self, stage: int, model: PreTrainedModel) -> tuple[PreTrainedModel, list[SiteReport]]:
        """The model that was kept after that stage, and the rows; `model` is what the run began with."""

    def training_file(self, stage: int, name: str) -> Path:
        """Where a training of a stage keeps its state while the stage is not finished; written by the training."""
