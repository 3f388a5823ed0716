"""`LevelFolder`: a folder with one file of tensors per block; written block by block, read from mapped memory.

<folder>/  levels.json                 what must be the same for a store to be continued
           journal.jsonl               one line per finished file, with its hash
           00-003.safetensors          block 3 of the model after the first choice of `before`
           01-model.safetensors        the model after the second choice of `before`; 01-decisions.safetensors
           lock, process.json          while it is being written
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmcompress.errors import CompressError, ExitCode
from llmcompress.storage.atomic import replacing
from llmcompress.storage.checked_tensors import own_memory
from llmcompress.storage.disk import disk_errors, sha256
from llmcompress.storage.json_file import read_json
from llmcompress.storage.json_lines import append_line, read_json_lines
from llmcompress.storage.lock import ProcessLock

_ABOUT = "llmcompress"
"""Metadata key of what the tensors of a file do not say."""

_SETTINGS, _JOURNAL = "levels.json", "journal.jsonl"


class StoredFile:
    """One finished file: its data without tensors, and tensors that are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._file = _opened(path)
        self.about: dict[str, Any] = json.loads(self._file.metadata()[_ABOUT])

    def tensor(self, name: str) -> Tensor:
        """By its name in the file."""
        found: Tensor = self._file.get_tensor(name)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All of them, mapped from the file."""
        return {name: self._file.get_tensor(name) for name in self._file.keys()}  # noqa: SIM118 (not a mapping)


class LevelFolder:
    """Files by key. Any number of processes may read what is finished while one writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._journal: dict[str, dict[str, Any]] = {}
        self._verified: set[str] = set()
        self._open: dict[str, StoredFile] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the list of finished files again."""
        self._journal = {line["file"]: line for line in _lines(self.folder / _JOURNAL)}

    @property
    def settings(self) -> dict[str, Any]:
        """What the levels were made from and with."""
        return read_json(self.folder / _SETTINGS, code="search.levels-damaged", fix="build the levels again")

    @property
    def fingerprint(self) -> str:
        """Changes with everything that levels depend on."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    @property
    def bytes_on_disk(self) -> int:
        """Of all finished files."""
        return sum(int(line["bytes"]) for line in self._journal.values())

    @contextmanager
    def writing(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Begin the store, or continue it; no other process writes meanwhile.

        Raises: CompressError when it was begun with other settings, or another process writes it.
        """
        with disk_errors(self.folder, saved="nothing was changed"):
            self.folder.mkdir(parents=True, exist_ok=True)
        lock = ProcessLock(self.folder)
        lock.take()
        try:
            self._settle(settings)
            read_json_lines(self.folder / _JOURNAL)  # cuts what a crash tore off
            self.refresh()
            yield
        finally:
            lock.release()

    def is_finished(self, key: str) -> bool:
        """Whether the file is the one that its line in the journal tells of; hashed once."""
        if key in self._journal and key not in self._verified:
            path = self._path(key)
            if path.is_file() and sha256(path) == self._journal[key]["sha256"]:
                self._verified.add(key)
        return key in self._verified

    def save(self, key: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keep it: once this returns, a crash cannot lose it.

        Raises: CompressError when the disk is full; all before is kept.
        """
        path = self._path(key)
        with disk_errors(path, saved=f"{len(self._journal)} finished files in {self.folder}"):
            with replacing(path) as part:
                save_file(own_memory(tensors), part, metadata={_ABOUT: json.dumps(about)})
            line = {"file": key, "sha256": sha256(path), "bytes": path.stat().st_size}
            append_line(self.folder / _JOURNAL, json.dumps(line))
        self._journal[key] = line
        self._verified.add(key)
        self._open.pop(key, None)

    def file(self, key: str) -> StoredFile:
        """A finished file.

        Raises: CompressError when it is missing.
        """
        if key not in self._open:
            if key not in self._journal:
                self.refresh()
            if key not in self._journal or not self._path(key).is_file():
                raise CompressError(
                    "search.levels-missing",
                    "the levels are not complete",
                    where=str(self._path(key)),
                    fix="build them to the end: what is finished is kept",
                    exit_code=ExitCode.USAGE,
                )
            self._open[key] = StoredFile(self._path(key))
        return self._open[key]

    def _settle(self, settings: Mapping[str, Any]) -> None:
        path = self.folder / _SETTINGS
        wanted = json.loads(json.dumps(settings))
        if path.exists():
            begun = self.settings
            if begun == wanted:
                return
            differing = sorted(key for key in begun.keys() | wanted.keys() if begun.get(key) != wanted.get(key))
            raise CompressError(
                "search.other-levels",
                "this folder has levels of something else",
                where=f"{self.folder} ({', '.join(differing)} differ)",
                fix="choose another folder, or remove this one",
                saved="the levels, as they were",
                exit_code=ExitCode.USAGE,
            )
        with disk_errors(path, saved="nothing was changed"), replacing(path) as part:
            part.write_text(json.dumps(wanted, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def _opened(path: Path) -> Any:
    return safe_open(path, framework="pt")


def block_key(before: int, block: int) -> str:
    """Of a block's levels; `before` is the place of a choice among those of the space."""
    return f"{before:02d}-{block:03d}"


def _lines(path: Path) -> list[Any]:
    """Finished lines; unlike `read_json_lines` it changes nothing, since another process may be writing."""
    found = []
    for raw in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if not raw.endswith(b"\n"):
            break
        found.append(json.loads(raw))
    return found
