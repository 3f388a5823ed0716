"""The folder of a study: settings, database, levels, what was found; it survives a crash at any moment.

study/  search.yaml       the resolved search file
        study.json        fingerprints, and the database where it is another than study.db
        study.db          Optuna's trials (SQLite), unless the study lives in another database
        levels/           what each option makes of each linear
        outcomes/WORKER.jsonl   what a worker found, written before the database is told
        workers/WORKER/   a lock for as long as it lives, and its log
        front.json, report/, recipes/, models/   what the search found
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmcompress.errors import CompressError, ExitCode
from llmcompress.plan_search.problem import Outcome
from llmcompress.plan_search.settings import SearchSettings, read_search
from llmcompress.progress import Progress
from llmcompress.storage.atomic import replacing
from llmcompress.storage.disk import disk_errors
from llmcompress.storage.json_file import read_json
from llmcompress.storage.json_lines import append_line, read_json_lines
from llmcompress.storage.lock import ProcessLock

SETTINGS, ABOUT, DATABASE, FRONT = "search.yaml", "study.json", "study.db", "front.json"
NAME = "llmcompress"
"""Of the study in a database of its own."""


class StudyFolder:
    """Where a study lies."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @property
    def levels(self) -> Path:
        """Of the level store."""
        return self.path / "levels"

    @property
    def recipes(self) -> Path:
        """Recipes of the front."""
        return self.path / "recipes"

    @property
    def exists(self) -> bool:
        """Whether a study was begun there."""
        return (self.path / ABOUT).is_file()

    def begin(self, settings: SearchSettings, identity: Mapping[str, str], *, url: str | None, name: str) -> None:
        """Make the folder, or find it with a study that began with the same settings, model and versions.

        Raises: CompressError when it holds another study or something else, naming what differs.
        """
        about = {"trials": settings.of_trials, "identity": dict(identity), "database": url, "name": name}
        with disk_errors(self.path, saved="nothing was changed"):
            if self.exists:
                self._check(read_json(self.path / ABOUT, code="search.damaged", fix="use another folder"), about)
                return
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise CompressError(
                    "search.not-ours",
                    "the study's folder holds something else",
                    where=str(self.path),
                    fix="choose a folder that does not exist yet",
                    exit_code=ExitCode.USAGE,
                )
            self.path.mkdir(parents=True, exist_ok=True)
            self._write(SETTINGS, settings.to_yaml())
            self._write(ABOUT, json.dumps(about, indent=1) + "\n")

    def _check(self, known: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        differing = [
            f"{part}.{key}" if part != "trials" else key
            for part in ("trials", "identity")
            for key in sorted({*known.get(part, {}), *about[part]})
            if known.get(part, {}).get(key) != about[part].get(key)
        ]
        differing += [key for key in ("database", "name") if known.get(key) != about[key]]
        if differing:
            raise CompressError(
                "search.other-study",
                f"this study was begun with other settings: {', '.join(differing)}",
                where=str(self.path),
                fix="use the same settings, or another folder",
                saved="everything; nothing was changed",
                exit_code=ExitCode.USAGE,
            )

    def _write(self, name: str, text: str) -> None:
        with replacing(self.path / name) as part:
            part.write_text(text, encoding="utf-8")

    def settings(self) -> SearchSettings:
        """Those that the study began with.

        Raises: CompressError when there is no study.
        """
        if not self.exists:
            raise CompressError(
                "search.no-study",
                "there is no study in this folder",
                where=str(self.path),
                fix="give the folder that `search` wrote",
                exit_code=ExitCode.USAGE,
            )
        return read_search(self.path / SETTINGS)

    def database(self) -> tuple[str, str]:
        """URL, and the name of the study in it."""
        about = read_json(self.path / ABOUT, code="search.damaged", fix="use another folder")
        return self.url_of(about.get("database")), str(about.get("name", NAME))

    def url_of(self, given: str | None) -> str:
        """The given URL, or that of the SQLite file in the folder."""
        return given or f"sqlite:///{self.path / DATABASE}"

    def worker(self, worker: str) -> Worker:
        """A worker of this folder, new or old, by its name."""
        return Worker(self.path, worker)

    def workers(self) -> list[Worker]:
        """All that ever were."""
        folder = self.path / "workers"
        return [Worker(self.path, path.name) for path in sorted(folder.iterdir())] if folder.is_dir() else []

    def outcomes(self, progress: Progress) -> dict[str, Outcome]:
        """Key → what workers found that do not live any more, whether the database was told or not.

        A line that a crash tore is cut, and this is told.
        """
        found: dict[str, Outcome] = {}
        for each in self.workers():
            if not each.is_alive:
                found |= each.outcomes(progress)
        return found


class Worker:
    """One process that judges plans: its lock, and the file of what it found."""

    def __init__(self, study: Path, name: str) -> None:
        self.name = name
        self._folder, self._file = study / "workers" / name, study / "outcomes" / f"{name}.jsonl"
        self._lock = ProcessLock(self._folder)

    @property
    def is_alive(self) -> bool:
        """Whether its process lives, on this host."""
        return self._lock.is_held()

    @property
    def log(self) -> Path:
        """What its process printed."""
        return self._folder / "log.txt"

    def begin(self) -> None:
        """Take its lock, for as long as this process lives or until `end`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file.parent.mkdir(exist_ok=True)
        self._lock.take()

    def end(self) -> None:
        """Give it back."""
        self._lock.release()

    def keep(self, key: str, outcome: Outcome) -> None:
        """Write an outcome down; once this returns, a crash cannot lose it."""
        line = {
            "key": key,
            "plan": list(outcome.plan),
            "tokens": outcome.tokens,
            "loss": outcome.loss if math.isfinite(outcome.loss) else None,
            "costs": dict(outcome.costs),
            "problem": outcome.problem,
        }
        with disk_errors(self._file, saved="all outcomes before"):
            append_line(self._file, json.dumps(line))

    def outcomes(self, progress: Progress) -> dict[str, Outcome]:
        """What it wrote down; only of a process that does not live, or of this one."""
        size = self._file.stat().st_size if self._file.is_file() else 0
        lines = read_json_lines(self._file)
        torn = size - (self._file.stat().st_size if self._file.is_file() else 0)
        if torn:
            progress.note(f"{self._file.name}: {torn} bytes that a crash left incomplete were removed")
        return {
            line["key"]: Outcome(
                tuple(line["plan"]),
                line["tokens"],
                math.inf if line["loss"] is None else line["loss"],
                line["costs"],
                line["problem"],
            )
            for line in lines
        }


def new_worker_name() -> str:
    """A name that no other worker has."""
    return uuid.uuid4().hex[:12]


def other_study(folder: StudyFolder) -> CompressError:
    """What a database holds was found with other levels or another text."""
    return CompressError(
        "search.other-study",
        "the study in this database was made with another model, space, text or version",
        where=str(folder.path),
        fix="use the same settings and versions, or another study",
        saved="everything; nothing was changed",
        exit_code=ExitCode.USAGE,
    )
