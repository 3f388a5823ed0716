"""The resume store of several processes: the first one saves, the others receive what it has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.calibration.process_group import ProcessGroup
from llmcompress.calibration.resume_store import ResumeStore
from llmcompress.modules.manifest import Manifest, apply_manifest, changes
from llmcompress.passes.apply import meta_copy
from llmcompress.records.rows import SiteReport


def shared(keep: ResumeStore | None, processes: ProcessGroup) -> ResumeStore | None:
    """The store of all these processes; of one alone its own."""
    return SharedResumeStore(keep, processes) if processes.count > 1 else keep


class SharedResumeStore(ResumeStore):
    """`keep` is the store of the first process; the others have none."""

    def __init__(self, keep: ResumeStore | None, processes: ProcessGroup) -> None:
        self._keep, self._processes = keep, processes

    @override
    def finished_blocks(self, stage: int) -> list[int]:
        return self._processes.broadcast(self._keep.finished_blocks(stage) if self._keep else [])

    @override
    def save_block(self, stage: int, index: int, block: nn.Module, before: nn.Module, rows: list[SiteReport]) -> None:
        if self._keep:
            self._keep.save_block(stage, index, block, before, rows)

    @override
    def restore_block(self, stage: int, index: int, block: nn.Module) -> list[SiteReport]:
        before, dtype = meta_copy(block), next(block.parameters()).dtype
        rows = self._keep.restore_block(stage, index, block) if self._keep else []
        manifest = self._processes.broadcast(changes(block, before).to_json() if self._keep else {})
        if not self._keep:
            apply_manifest(block, Manifest.from_json(manifest), dtype)
        self._processes.broadcast_tensors(block)
        return self._processes.broadcast(rows)

    @override
    def block_state(self, stage: int, index: int) -> Mapping[str, Tensor]:
        raise AssertionError("several processes hold their weights in memory")

    @override
    def decisions(self, stage: int) -> dict[str, Tensor] | None:
        return self._processes.broadcast(self._keep.decisions(stage) if self._keep else None)

    @override
    def save_decisions(self, stage: int, decisions: Mapping[str, Tensor]) -> None:
        if self._keep:
            self._keep.save_decisions(stage, decisions)

    @override
    def measurement(self, name: str) -> tuple[Mapping[str, Tensor], Mapping[str, Any]] | None:
        return self._processes.broadcast(self._keep.measurement(name) if self._keep else None)

    @override
    def save_measurement(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        if self._keep:
            self._keep.save_measurement(name, tensors, about)

    @override
    def finished_model(self) -> int | None:
        """Passes on whole models run in one process."""
        return None

    @override
    def save_model(self, stage: int, model: PreTrainedModel, rows: list[SiteReport]) -> None:
        raise AssertionError("passes on whole models run in one process")

    @override
    def restore_model(self, stage: int, model: PreTrainedModel) -> tuple[PreTrainedModel, list[SiteReport]]:
        raise AssertionError("passes on whole models run in one process")

    @override
    def training_file(self, stage: int, name: str) -> Path:
        """The first process's: it writes, and all must be able to read it."""
        return Path(self._processes.broadcast(str(self._keep.training_file(stage, name)) if self._keep else ""))
