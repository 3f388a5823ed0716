"""The run folder next to the output: everything that an interrupted run needs to resume, bit for bit.

<output>.run/   lock.yaml         the resolved recipe; compressing with it repeats the run
                fingerprint.json  what must be the same for a resume to make sense
                journal.jsonl     one line per finished file of the next line, with its hash
                work/SS-NNN.safetensors (block NNN of stage SS), SS-decisions.safetensors, SS-model.safetensors,
                     SS-…-measured.safetensors,
                     SS-training-NAME.safetensors, or SS-training-NAME/step-N of a trainer of another library (not in
                     the journal: gone when its stage is finished)
                work/data/NN-STEP.jsonl    the rows that a step of `data` made, one line per unit (not in the journal)
                log.jsonl
                lock, process.json
                llmcompress_run.txt  marks the folder as created by a run: no other is ever removed
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmcompress.errors import NOTHING_SAVED, CompressError, ExitCode, note_saved, without_tokens
from llmcompress.model.snapshot import about_model, model_again
from llmcompress.modules.manifest import Manifest, apply_manifest, changes
from llmcompress.records.rows import SiteReport
from llmcompress.storage.atomic import replacing
from llmcompress.storage.checked_tensors import own_memory
from llmcompress.storage.disk import disk_errors, sha256
from llmcompress.storage.folder import run_folder
from llmcompress.storage.json_lines import append_line, read_json_lines
from llmcompress.storage.lock import ProcessLock
from llmcompress.storage.ownership import begin_run_folder, clear_run_folder, remove_run_folder

_ABOUT = "llmcompress"
"""Metadata key of a kept file: what its tensors do not say."""

_DECISIONS, _MODEL, _MEASURED, _TRAINING = "-decisions", "-model", "-measured", "-training-"
_NOT_BLOCKS = (_DECISIONS, _MODEL, _MEASURED)


class Run:
    """One run's folder, locked while it is open. Open it with `Run.open`, close it by leaving the `with` block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = ProcessLock(folder)
        self._journal: dict[str, dict[str, Any]] = {}
        self._verified: set[str] = set()

    @classmethod
    def open(cls, output: Path, *, fingerprint: dict[str, str], lock_text: str, fresh: bool) -> Self:
        """Start a run, or resume the one found next to `output`; `fresh` discards that one.

        A run that has saved nothing is not resumed: it starts over, with any settings.

        Raises: CompressError when another process works on it, it was started with something else, or the folder is
        the user's own.
        """
        run = cls(run_folder(output))
        with disk_errors(run.folder, saved="nothing was changed"):
            begin_run_folder(run.folder)
            (run.folder / "work").mkdir(exist_ok=True)
            run._lock.take()
            try:
                if fresh:
                    run._clear()
                run._read_journal()
                run._settle(fingerprint, lock_text)
            except BaseException:
                run._lock.release()
                raise
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._lock.release()
            return
        saved = self.saved
        if isinstance(error, CompressError):
            if error.saved == NOTHING_SAVED:
                error.saved = saved
        else:
            note_saved(error, saved)
        if saved == NOTHING_SAVED:
            self.discard()
            return
        self.log("stopped", error=f"{type(error).__name__}: {error}", saved=saved)
        self._lock.release()

    def finished_blocks(self, stage: int) -> list[int]:
        """Blocks of a stage that need no more work: 0, 1, … up to the first whose file is missing or damaged."""
        count = 0
        while self._is_valid(_block_key(stage, count)):
            count += 1
        return list(range(count))

    @property
    def data_folder(self) -> Path:
        """Where the steps of `data` keep their rows."""
        return self.folder / "work" / "data"

    @property
    def saved(self) -> str:
        """Describes what is saved, for error messages."""
        kept = [key for key in self._journal if self._is_valid(key)]
        counts = {
            "finished blocks": sum(not key.endswith(_NOT_BLOCKS) for key in kept),
            "all finished whole-model passes": sum(key.endswith(_MODEL) for key in kept),
            "decisions": sum(key.endswith(_DECISIONS) for key in kept),
            "measurements": sum(key.endswith(_MEASURED) for key in kept),
            "data steps": len(list(self.data_folder.glob("*.jsonl"))),
            "the training progress": sum(
                len(list((self.folder / "work").glob(f"*{_TRAINING}*{end}"))) for end in (".safetensors", "/step-*")
            ),
        }
        if not any(counts.values()):
            return NOTHING_SAVED
        what = " and ".join(f"{count} {name}" for name, count in counts.items() if count)
        return f"{what} in {self.folder}: run the same command again to resume"

    def save_block(self, stage: int, index: int, block: nn.Module, before: nn.Module, rows: list[SiteReport]) -> None:
        """Keep every tensor of a block, how it differs from its outline `before`, and its report rows.

        Once this returns, a crash cannot lose them. Raises: CompressError when the disk is full; all before is kept.
        """
        self._save(_block_key(stage, index), block.state_dict(), changes(block, before).to_json(), rows)

    def restore_block(self, stage: int, index: int, block: nn.Module) -> list[SiteReport]:
        """Make a block as it was before its stage what `save_block` saw, bit for bit; its report rows."""
        key = _block_key(stage, index)
        tensors, about = self._read(key)
        dtype = next(block.parameters()).dtype
        apply_manifest(block, Manifest.from_json(about), dtype)
        _load(block, tensors, key)
        return self._rows(key)

    def block_state(self, stage: int, index: int) -> dict[str, Tensor]:
        """Every tensor of a finished block, mapped from its file: it takes no memory until it is read."""
        return self._read(_block_key(stage, index))[0]

    def decisions(self, stage: int) -> dict[str, Tensor] | None:
        """What the first pass of a stage decided, if it has."""
        key = f"{stage:02d}{_DECISIONS}"
        return self._read(key)[0] if self._is_valid(key) else None

    def save_decisions(self, stage: int, decisions: Mapping[str, Tensor]) -> None:
        """Keep it, or raise CompressError when the disk is full."""
        self._save(f"{stage:02d}{_DECISIONS}", decisions, {}, [])

    def measurement(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What a pass measured before it decided, and what its tensors do not say; None if it has not."""
        key = f"{name}{_MEASURED}"
        return self._read(key) if self._is_valid(key) else None

    def save_measurement(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keep it, or raise CompressError when the disk is full."""
        self._save(f"{name}{_MEASURED}", tensors, dict(about), [])

    def finished_model(self) -> int | None:
        """The last stage after which the whole model was kept."""
        found = [int(key.removesuffix(_MODEL)) for key in self._journal if key.endswith(_MODEL) and self._is_valid(key)]
        return max(found, default=None)

    def save_model(self, stage: int, model: PreTrainedModel, rows: list[SiteReport]) -> None:
        """Keep the whole model: its config, how it differs from that config's stock model, all tensors, and all rows.

        Raises: CompressError when the disk is full; all before is kept.
        """
        self._save(f"{stage:02d}{_MODEL}", model.state_dict(), about_model(model), rows)
        for path in (self.folder / "work").glob(f"{stage:02d}{_TRAINING}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def restore_model(self, stage: int, model: PreTrainedModel) -> tuple[PreTrainedModel, list[SiteReport]]:
        """The model that was kept after that stage, and all rows until then; `model` is what the run began with."""
        key = f"{stage:02d}{_MODEL}"
        return model_again(model, *self._read(key)), self._rows(key)

    def training_file(self, stage: int, name: str) -> Path:
        """Where a training keeps its state until the stage's model is kept."""
        return self._file(f"{stage:02d}{_TRAINING}{name}")

    def log(self, event: str, **facts: Any) -> None:
        """One line in log.jsonl: what happened when, for people and bug reports."""
        _append(self.folder / "log.jsonl", {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **facts})

    def discard(self) -> None:
        """Remove the folder: the result is published, or there is nothing to keep."""
        self._lock.release()
        remove_run_folder(self.folder)

    def _save(self, key: str, tensors: Mapping[str, Tensor], about: dict[str, Any], rows: list[SiteReport]) -> None:
        path = self._file(key)
        with disk_errors(path, saved=self.saved):
            with replacing(path) as part:
                save_file(own_memory(tensors), part, metadata={_ABOUT: json.dumps(about)})
            line = {
                "file": key,
                "sha256": sha256(path),
                "rows": [row.model_dump(mode="json", exclude_none=True) for row in rows],
            }
            _append(self.folder / "journal.jsonl", line, durable=True)
        self._journal[key] = line
        self._verified.add(key)

    def _read(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        with safe_open(self._file(key), framework="pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()[_ABOUT])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 (not a mapping)

    def _rows(self, key: str) -> list[SiteReport]:
        return [SiteReport(**row) for row in self._journal[key]["rows"]]

    def _is_valid(self, key: str) -> bool:
        """Whether a file is the one that its journal line tells of; hashed once."""
        if key in self._journal and key not in self._verified:
            path = self._file(key)
            if path.is_file() and sha256(path) == self._journal[key]["sha256"]:
                self._verified.add(key)
        return key in self._verified

    def _file(self, key: str) -> Path:
        return self.folder / "work" / f"{key}.safetensors"

    def _clear(self) -> None:
        clear_run_folder(self.folder)
        (self.folder / "work").mkdir()
        self._journal, self._verified = {}, set()

    def _settle(self, fingerprint: Mapping[str, str], lock_text: str) -> None:
        """Write what this run is, or check that it is the run that was begun here."""
        given = {key: without_tokens(value) for key, value in fingerprint.items()}
        begun = self._begun()
        if begun == given:
            return
        if begun is None or self.saved == NOTHING_SAVED:
            self._clear()
            (self.folder / "lock.yaml").write_text(without_tokens(lock_text))
            with replacing(self.folder / "fingerprint.json") as part:
                part.write_text(json.dumps(given, indent=2, sort_keys=True) + "\n")
            return
        if not begun:
            raise CompressError(
                "run.damaged",
                "the settings of an unfinished run are damaged",
                where=str(self.folder / "fingerprint.json"),
                fix="set `fresh=True` to start over",
                saved="the unfinished run, as it was",
                exit_code=ExitCode.USAGE,
            )
        differing = sorted(key for key in begun.keys() | given.keys() if begun.get(key) != given.get(key))
        changes = "; ".join(f"{key}: {begun.get(key, '-')} → {given.get(key, '-')}" for key in differing)
        raise CompressError(
            "run.other",
            "an unfinished run with other settings exists for this output",
            where=f"{self.folder} ({changes})",
            fix="set `fresh=True` to discard it and start over, or repeat the earlier run to finish it",
            saved="the unfinished run, as it was",
            exit_code=ExitCode.USAGE,
        )

    def _begun(self) -> dict[str, str] | None:
        """What was begun here; None where nothing was, and nothing known where a crash tore the file."""
        path = self.folder / "fingerprint.json"
        if not path.exists():
            return None
        try:
            begun = json.loads(path.read_bytes())
        except ValueError:
            return {}
        return begun if isinstance(begun, dict) else {}

    def _read_journal(self) -> None:
        """Read the finished lines; a line that a crash tore off is cut."""
        for line in read_json_lines(self.folder / "journal.jsonl"):
            self._journal[line["file"]] = line


def _block_key(stage: int, index: int) -> str:
    return f"{stage:02d}-{index:03d}"


def _load(block: nn.Module, tensors: Mapping[str, Tensor], key: str) -> None:
    here = block.state_dict()
    wrong = {name for name, tensor in tensors.items() if name in here and here[name].dtype != tensor.dtype}
    assert not wrong, f"{key} was saved in another dtype: {sorted(wrong)[:3]}"
    block.load_state_dict(tensors, strict=True)


def _append(path: Path, line: Mapping[str, Any], *, durable: bool = False) -> None:
    append_line(path, without_tokens(json.dumps(line, ensure_ascii=False)), durable=durable)
