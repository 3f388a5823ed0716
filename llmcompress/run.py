"""The run folder beside the output: what a killed run needs to go on at the block it reached, bit for bit.

<output>.run/   lock.yaml         the resolved recipe; compressing with it repeats the run
                fingerprint.json  what must be the same for a resume to make sense
                journal.jsonl     one line per finished block, with the hash of its file
                blocks/NNN.safetensors, log.jsonl, process.json
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llmcompress.errors import NOTHING_SAVED, CompressError, ExitCode
from llmcompress.evaluation.report import SiteReport
from llmcompress.export.disk import disk_errors, sha256, sync
from llmcompress.export.folder import run_folder
from llmcompress.export.lock import ProcessLock
from llmcompress.modules.quant_linear import QuantLinear

_SPECS = "llmcompress.modules"


class Run:
    """One run's folder, locked while it is open. Open it with `Run.open`, close it by leaving the `with` block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = ProcessLock(folder)
        self._journal: dict[int, dict[str, Any]] = {}
        self._verified: set[int] = set()

    @classmethod
    def open(cls, output: Path, *, fingerprint: dict[str, str], lock_text: str, fresh: bool) -> Self:
        """Start a run, or go on with the one found beside `output`; `fresh` throws that one away.

        Raises: CompressError when another process works on it, or it was started with something else.
        """
        run = cls(run_folder(output))
        with disk_errors(run.folder, saved="nothing was changed"):
            (run.folder / "blocks").mkdir(parents=True, exist_ok=True)
            run._lock.take()
            try:
                if fresh:
                    run._clear()
                run._settle(fingerprint, lock_text)
                run._read_journal()
            except BaseException:
                run._lock.release()
                raise
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, CompressError) and error.saved == NOTHING_SAVED:
            error.saved = self.saved
        if error is not None:
            self.log("stopped", error=f"{type(error).__name__}: {error}", finished_blocks=len(self.finished_blocks()))
        self._lock.release()

    def finished_blocks(self) -> list[int]:
        """Blocks that need no more work: 0, 1, … up to the first whose file is missing or damaged."""
        count = 0
        while count in self._journal and self._is_valid(count):
            count += 1
        return list(range(count))

    @property
    def saved(self) -> str:
        """What is kept, in words for an error."""
        count = len(self.finished_blocks())
        return (
            f"{count} finished blocks in {self.folder}: run the same command again to go on" if count else NOTHING_SAVED
        )

    def save_block(self, index: int, block: nn.Module, rows: list[SiteReport]) -> None:
        """Keep every tensor of a block and its report rows; once this returns, a crash cannot lose them.

        Raises: CompressError when the disk is full; the blocks before are kept.
        """
        specs = {name: part.spec() for name, part in block.named_modules() if isinstance(part, QuantLinear)}
        path = self._block_file(index)
        part = path.with_suffix(".part")
        before = f"the {len(self.finished_blocks())} blocks before it, in {self.folder}"
        with disk_errors(path, saved=before):
            save_file(_own_memory(block.state_dict()), part, metadata={_SPECS: json.dumps(specs)})
            sync(part)
            line = {
                "block": index,
                "sha256": sha256(part),
                "rows": [row.model_dump(mode="json", exclude_none=True) for row in rows],
            }
            os.replace(part, path)
            sync(path.parent)
            _append(self.folder / "journal.jsonl", line, durable=True)
        self._journal[index] = line
        self._verified.add(index)

    def restore_block(self, index: int, block: nn.Module) -> list[SiteReport]:
        """Make a freshly loaded block what `save_block` saw, bit for bit; its report rows."""
        with safe_open(self._block_file(index), framework="pt") as file:
            specs: dict[str, dict[str, str | int | bool]] = json.loads(file.metadata()[_SPECS])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        for name, spec in specs.items():
            parent, _, leaf = name.rpartition(".")
            site = QuantLinear.from_spec(spec, tensors[f"{name}.scale_OG"].dtype)
            setattr(block.get_submodule(parent), leaf, site.train(block.training))
        here = block.state_dict()
        wrong = {name for name, tensor in tensors.items() if name in here and here[name].dtype != tensor.dtype}
        assert not wrong, f"block {index} was saved in another dtype: {sorted(wrong)[:3]}"
        block.load_state_dict(tensors, strict=True)
        return [SiteReport(**row) for row in self._journal[index]["rows"]]

    def log(self, event: str, **facts: Any) -> None:
        """One line in log.jsonl: what happened when, for people and bug reports."""
        _append(self.folder / "log.jsonl", {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **facts})

    def discard(self) -> None:
        """Remove the folder: the result is published."""
        self._lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_valid(self, index: int) -> bool:
        """Whether a block's file is the one its journal line tells of; hashed once."""
        path = self._block_file(index)
        if index not in self._verified and path.is_file() and sha256(path) == self._journal[index]["sha256"]:
            self._verified.add(index)
        return index in self._verified

    def _block_file(self, index: int) -> Path:
        return self.folder / "blocks" / f"{index:03d}.safetensors"

    def _clear(self) -> None:
        for name in ("journal.jsonl", "fingerprint.json", "lock.yaml", "log.jsonl"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "blocks")
        (self.folder / "blocks").mkdir()

    def _settle(self, fingerprint: Mapping[str, str], lock_text: str) -> None:
        """Write what this run is, or check that it is the run that was begun here."""
        path = self.folder / "fingerprint.json"
        if not path.exists():
            self._clear()
            (self.folder / "lock.yaml").write_text(lock_text)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(fingerprint, indent=2, sort_keys=True) + "\n")
            sync(part)
            os.replace(part, path)
            sync(self.folder)
            return
        begun: dict[str, str] = json.loads(path.read_text())
        differing = sorted(key for key in begun.keys() | fingerprint.keys() if begun.get(key) != fingerprint.get(key))
        if differing:
            changes = "; ".join(f"{key}: {begun.get(key, '-')} → {fingerprint.get(key, '-')}" for key in differing)
            raise CompressError(
                "run.other",
                "an unfinished run with other settings is kept beside the output",
                where=f"{self.folder} ({changes})",
                fix="add --fresh to throw it away and start again, or repeat the earlier command to finish it",
                saved="the unfinished run, as it was",
                exit_code=ExitCode.USAGE,
            )

    def _read_journal(self) -> None:
        """Read the finished lines; a line that a crash tore off is cut."""
        path = self.folder / "journal.jsonl"
        data = path.read_bytes() if path.exists() else b""
        good = 0
        for raw in data.splitlines(keepends=True):
            try:
                line = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                line = None
            if line is None:
                break
            self._journal[line["block"]] = line
            good += len(raw)
        if good < len(data):
            with path.open("r+b") as file:
                file.truncate(good)
            sync(path)


def _own_memory(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors wants them: contiguous, and no two in one memory."""
    seen: set[int] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in state.items():
        place = tensor.untyped_storage().data_ptr()
        kept[name] = torch.clone(tensor) if place in seen else tensor
        kept[name] = kept[name].contiguous()
        seen.add(place)
    return kept


def _append(path: Path, line: Mapping[str, Any], *, durable: bool = False) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if durable:
            file.flush()
            os.fsync(file.fileno())
