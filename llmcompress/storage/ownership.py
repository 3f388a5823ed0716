"""Which folders and files llmcompress may remove: only those with a marker, which is written before anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from llmcompress.errors import CompressError, ExitCode
from llmcompress.storage.names import FILES

RUN_MARKER = "llmcompress_run.txt"
_OF_ONE_RUN = ("journal.jsonl", "fingerprint.json", "fingerprint.json.part", "lock.yaml", "log.jsonl", "work")
"""What is thrown away when a run starts over."""

_ALL_OF_RUNS = (*_OF_ONE_RUN, "converted", "process.json", "lock", RUN_MARKER)
_ABOUT_RUN = (
    "Unfinished work of an llmcompress run. Running the same command again resumes from here and removes this folder.\n"
)


@dataclass(frozen=True)
class FileDigest:
    """A file as it was written."""

    bytes: int
    sha256: str


def mark_output(folder: Path, files: Mapping[str, FileDigest | None] | Iterable[str] = ()) -> None:
    """Write into an output folder, or one that will become it, which files in it are ours, and what they hold."""
    (folder / FILES).write_text(files_text(files), encoding="utf-8")


def files_text(files: Mapping[str, FileDigest | None] | Iterable[str]) -> str:
    """The list of files as it is written; it has no digest of itself."""
    known = files if isinstance(files, Mapping) else dict.fromkeys(files)
    found = {name: asdict(each) if each else None for name, each in {**known, FILES: None}.items()}
    return json.dumps({"files": dict(sorted(found.items()))}, indent=1) + "\n"


def written_files(folder: Path) -> dict[str, FileDigest | None]:
    """Name → digest of every file that we wrote there; None where it is not known. Empty for a folder of another's.

    Names are as the list has them, which may come from anywhere: the caller asks whether they stay inside.
    """
    try:
        named = json.loads((folder / FILES).read_text(encoding="utf-8"))["files"]
        about = named if isinstance(named, dict) else dict.fromkeys(named)
        return {str(name): _digest(each) for name, each in about.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _digest(value: object) -> FileDigest | None:
    if not isinstance(value, dict):
        return None
    return FileDigest(int(value["bytes"]), str(value["sha256"]))


def is_our_output(folder: Path) -> bool:
    """Whether we wrote that folder, complete or not."""
    return (folder / FILES).is_file()


def other_files(folder: Path) -> list[str]:
    """Files in a folder, however deep, that we did not write: all of them where it is not ours."""
    ours = written_files(folder)
    inside = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return [name for path in inside if (name := path.relative_to(folder).as_posix()) not in ours]


def remove_output(folder: Path) -> None:
    """Remove a folder of ours, its marker last: killed halfway, it is still known as ours."""
    for path in folder.iterdir():
        if path.name != FILES:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / FILES).unlink(missing_ok=True)
    folder.rmdir()


def begin_run_folder(folder: Path) -> None:
    """Make a run folder, or find ours.

    Raises: CompressError when a folder of that name holds something of the user's.
    """
    check_run_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / RUN_MARKER).is_file():
        (folder / RUN_MARKER).write_text(_ABOUT_RUN, encoding="utf-8")


def check_run_folder(folder: Path) -> None:
    """That a run may use the folder: it is not there, it is empty, or a run made it.

    Raises: CompressError when it is the user's own.
    """
    absent = not folder.exists() and not folder.is_symlink()
    if absent or (folder.is_dir() and (is_our_run(folder) or not any(folder.iterdir()))):
        return
    raise CompressError(
        "run.not-ours",
        "the run folder for unfinished work already exists, and llmcompress did not create it",
        where=str(folder),
        fix="choose another output folder, or move that one",
        exit_code=ExitCode.USAGE,
    )


def is_our_run(folder: Path) -> bool:
    """Whether a run made it."""
    return (folder / RUN_MARKER).is_file()


def remove_run_folder(folder: Path) -> None:
    """Remove what a run wrote, its marker last; the folder stays if it holds anything else."""
    if is_our_run(folder):
        _remove(folder, _ALL_OF_RUNS)
        if not any(folder.iterdir()):
            folder.rmdir()


def remove_unused_run_folder(folder: Path) -> None:
    """Remove the folder of a run that was prepared and never begun."""
    if not (folder / "fingerprint.json").exists():
        remove_run_folder(folder)


def clear_run_folder(folder: Path) -> None:
    """Remove what a run kept in its folder, which another run then uses."""
    _remove(folder, _OF_ONE_RUN)


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
