"""The output folder: refused early if it cannot be written, filled beside its place, moved there in one step."""

from __future__ import annotations

import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from llmcompress.errors import CompressError, ExitCode
from llmcompress.storage.disk import disk_errors, sha256, sync
from llmcompress.storage.lock import ProcessLock
from llmcompress.storage.names import INDEX

_LONGEST_NAME = 255 - len(".") - len(".tmp-01234567")
"""File systems allow 255 bytes."""


def check_output(output: Path, *, overwrite: bool, needed_bytes: int = 0) -> None:
    """Before any work: that `output` can be written, and what an earlier killed run left beside it is cleared.

    Raises: CompressError for a file, a folder in use, a place that is not ours to replace, a read-only or full disk.
    """
    output = output.absolute()
    _check_name(output)
    _recover(output)
    if output.exists() and not output.is_dir():
        raise _usage("output.is-file", "the output is a file", output, "name a folder that does not exist yet")
    home, here = Path.home().resolve(), Path.cwd().resolve()
    if output.resolve() in {home, *home.parents, here, *here.parents}:
        raise _usage("output.unsafe", "the output would replace a folder that holds other things", output, _NEW)
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            fix = "choose another folder, or add --overwrite: the old one is kept until the new one is complete"
            raise _usage("output.exists", "the output folder is not empty", output, fix)
        if not (output / "config.json").is_file():
            raise _usage("output.unsafe", "the output folder holds something other than a model", output, _NEW)
    parent = next(folder for folder in output.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise _usage("output.read-only", "the output folder cannot be created", output, f"make {parent} writable")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes * 1.1:
        raise CompressError(
            "output.disk-full",
            f"about {needed_bytes / 1e9:.2f} GB will be written, {free / 1e9:.2f} GB are free",
            where=str(output),
            fix="free disk space or choose another disk",
            exit_code=ExitCode.RESOURCES,
        )


def _check_name(output: Path) -> None:
    """The names made from it must fit too: `.NAME.tmp-01234567` is the longest."""
    length = len(os.fsencode(output.name))
    if length > _LONGEST_NAME:
        what = f"the output's name is too long: {length} bytes, at most {_LONGEST_NAME}"
        raise _usage("output.name", what, output, "choose a shorter name")


def run_folder(output: Path) -> Path:
    """Where a run on `output` keeps its unfinished work."""
    return output.absolute().parent / f"{output.name}.run"


@contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside `output`, on the same file system, to fill and then `publish`; removed on any error."""
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.parent / f".{output.name}.tmp-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        with disk_errors(output, saved="all finished blocks: run the same command again"):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(staging: Path, output: Path, *, overwrite: bool) -> dict[str, str]:
    """Check every file of `staging`, then make it `output` by renaming; sha256 by file name.

    Killed at any point it leaves the old folder or the new one complete, never a mixture. Between the two renames of
    an overwrite the old one is called `.NAME.old-…`; `check_output` of the next run puts it back.

    Raises: CompressError when a weight file does not read back, or `output` is in use.
    """
    output = output.absolute()
    hashes = {str(path.relative_to(staging)): sha256(path) for path in sorted(staging.rglob("*")) if path.is_file()}
    _check_weights(staging)
    for path in [*staging.rglob("*"), staging]:
        sync(path)
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()
    if output.exists():
        if not overwrite:
            raise _usage("output.exists", "the output folder was filled meanwhile", output, "add --overwrite")
        aside = output.parent / f".{output.name}.old-{uuid.uuid4().hex[:8]}"
        os.rename(output, aside)
        os.rename(staging, output)
        sync(output.parent)
        shutil.rmtree(aside)
    else:
        os.rename(staging, output)
        sync(output.parent)
    return hashes


_NEW = "name a folder that does not exist yet"


def _usage(code: str, what: str, output: Path, fix: str) -> CompressError:
    return CompressError(code, what, where=str(output), fix=fix, exit_code=ExitCode.USAGE)


def _recover(output: Path) -> None:
    """Undo what a killed run left beside `output`: half-filled folders go, a folder moved aside comes back.

    A living run is left alone: its half-filled folder is its own.
    """
    if ProcessLock(run_folder(output)).is_held():
        return
    for left in output.parent.glob(glob.escape(f".{output.name}.old-") + "*"):
        if output.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            os.rename(left, output)
    for left in output.parent.glob(glob.escape(f".{output.name}.tmp-") + "*"):
        shutil.rmtree(left, ignore_errors=True)


def _check_weights(folder: Path) -> None:
    """Every weight file opens, and the index names exactly the tensors that are there."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path.name)
        except (OSError, SafetensorError) as problem:
            raise _unreadable(path, str(problem)) from problem
    index = folder / INDEX
    if index.is_file() and json.loads(index.read_text())["weight_map"] != found:
        raise _unreadable(index, "the index does not match the shards")


def _unreadable(path: Path, what: str) -> CompressError:
    return CompressError(
        "output.unreadable",
        f"a file that was just written does not read back: {what}",
        where=path.name,
        fix="check the disk and run the same command again",
        saved="all finished blocks; the output folder is as it was",
        exit_code=ExitCode.RESOURCES,
    )
