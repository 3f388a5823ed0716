"""The output folder: refused early if it cannot be written, filled in a staging folder, published in one step."""

from __future__ import annotations

import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from safetensors import SafetensorError, safe_open

from llmcompress.errors import CompressError, ExitCode
from llmcompress.storage.disk import disk_errors, sha256, sync
from llmcompress.storage.lock import ProcessLock
from llmcompress.storage.names import FILES, INDEX
from llmcompress.storage.ownership import (
    FileDigest,
    check_run_folder,
    is_our_output,
    mark_output,
    other_files,
    remove_output,
)


def check_output(output: Path, *, overwrite: bool, needed_bytes: int = 0, source: Path | None = None) -> None:
    """Before any work: check that `output` can be written, and clean up after an earlier killed run.

    `source` is the folder that will be read, if there is one of that name: an output that contains, is or is inside it
    is refused.

    Raises: CompressError for a file, a link, a folder in use or with files of the user's, a read-only or full disk.
    """
    output = output.absolute()
    if max(len(os.fsencode(name)) for name in (*output.parts, _beside(output, "tmp").name)) > _LONGEST_NAME:
        raise _usage("output.name", "the output's name is too long for a file system", output, "choose a shorter name")
    check_run_folder(run_folder(output))
    if output.is_symlink():
        there = f"give the folder it points to: {output.resolve()}"
        raise _usage("output.is-link", "the output is a symbolic link, which cannot be replaced", output, there)
    if source is not None and source.is_dir():
        _check_apart(output, source)
    _recover(output)
    if output.exists() and not output.is_dir():
        raise _usage("output.is-file", "the output is a file", output, "choose a folder that does not exist yet")
    home, here = Path.home().resolve(), Path.cwd().resolve()
    if output.resolve() in {home, *home.parents, here, *here.parents}:
        raise _usage("output.unsafe", "the output would replace a folder that contains other things", output, _NEW)
    if output.is_dir() and any(output.iterdir()):
        _check_filled(output, overwrite=overwrite)
    parent = next(folder for folder in output.parents if folder.exists())
    if not parent.is_dir():
        raise _usage("output.is-file", f"{parent} is a file", output, "choose a folder that is not below a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _usage("output.read-only", "the output folder cannot be created", output, f"make {parent} writable")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes * 1.1:
        raise CompressError(
            "output.disk-full",
            f"about {needed_bytes / 1e9:.2f} GB are needed, but only {free / 1e9:.2f} GB are free",
            where=str(output),
            fix="free disk space or choose another disk",
            exit_code=ExitCode.RESOURCES,
        )


def _check_apart(output: Path, source: Path) -> None:
    """That neither of two folders holds the other, nor `output` a file that the source links to."""
    there, read = output.resolve(), source.resolve()
    holders = {read, *(path.resolve() for path in source.iterdir())}
    for folder in (there, run_folder(output).resolve()):
        if folder.is_relative_to(read) or any(each.is_relative_to(folder) for each in holders):
            what = "the output folder and the source model's folder overlap"
            raise _usage("output.is-source", what, output, f"choose a folder outside {source}")


def _check_filled(output: Path, *, overwrite: bool) -> None:
    """That a folder with something in it is one that we wrote, with nothing of the user's."""
    if not overwrite:
        fix = "choose another folder, or set `overwrite=True`: the old one is kept until the new one is complete"
        raise _usage("output.exists", "the output folder is not empty", output, fix)
    if not is_our_output(output):
        raise _usage("output.unsafe", "the output folder was not written by llmcompress", output, _NEW)
    others = other_files(output)
    if others:
        names = ", ".join(others[:_NAMED]) + (f" and {len(others) - _NAMED} more" if len(others) > _NAMED else "")
        what = f"the output folder contains files that llmcompress did not write: {names}"
        raise _usage("output.other-files", what, output, "move them elsewhere, or choose another folder")


def run_folder(output: Path) -> Path:
    """Where a run on `output` keeps its unfinished work."""
    return output.absolute().parent / f"{output.name}.run"


@contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """An empty folder next to `output`, on the same file system, to fill and then `publish`; removed on any error."""
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = _beside(output, "tmp")
    folder.mkdir()
    try:
        mark_output(folder)
        with disk_errors(output, saved="all finished blocks: run the same command again"):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _beside(output: Path, kind: str) -> Path:
    """A hidden name next to `output` that is not in use."""
    return output.parent / f".{output.name}.{kind}-{uuid.uuid4().hex[:8]}"


def publish(staging: Path, output: Path, *, overwrite: bool) -> dict[str, str]:
    """Check every file of `staging`, then make it `output` by renaming; sha256 by file name.

    A list of the files with their digests goes with them: a later overwrite knows what it may remove, and `verify`
    whether they are what was written.

    Killed at any point it leaves the old folder or the new one complete, never a mixture. Between the two renames of
    an overwrite the old one is called `.NAME.old-…`; `check_output` of the next run puts it back.

    Raises: CompressError when a weight file does not read back, or `output` is in use.
    """
    output = output.absolute()
    paths = {path.relative_to(staging).as_posix(): path for path in sorted(staging.rglob("*")) if path.is_file()}
    hashes = {name: sha256(path) for name, path in paths.items() if name != FILES}
    mark_output(staging, {name: FileDigest(paths[name].stat().st_size, hash) for name, hash in hashes.items()})
    hashes[FILES] = sha256(staging / FILES)
    _check_weights(staging)
    for path in [*staging.rglob("*"), staging]:
        sync(path)
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()
    if output.exists():
        if not overwrite:
            raise _usage(
                "output.exists", "the output folder was written to during the run", output, "set `overwrite=True`"
            )
        _check_filled(output, overwrite=True)
        aside = _beside(output, "old")
        os.rename(output, aside)
        os.rename(staging, output)
        sync(output.parent)
        remove_output(aside)
    else:
        os.rename(staging, output)
        sync(output.parent)
    return hashes


def set_aside(staging: Path, output: Path) -> Path:
    """Keep a folder that must not be published, under a visible name beside `output`; that name."""
    output = output.absolute()
    names = (output.with_name(f"{output.name}.faulty{'' if number == 1 else f'-{number}'}") for number in count(1))
    aside = next(name for name in names if not name.exists())
    os.rename(staging, aside)
    return aside


_NEW = "choose a folder that does not exist yet"
_LONGEST_NAME = 255
"""Bytes, on every common file system."""
_NAMED = 10
"""Files listed by name in an error."""


def _usage(code: str, what: str, output: Path, fix: str) -> CompressError:
    return CompressError(code, what, where=str(output), fix=fix, exit_code=ExitCode.USAGE)


def _recover(output: Path) -> None:
    """Clean up after a killed run: remove half-filled folders, and restore a folder that was moved aside.

    A living run is left alone: its half-filled folder is its own. So is every folder that is not marked as ours.
    """
    if ProcessLock(run_folder(output)).is_held():
        return
    for left in _left_beside(output, "old"):
        if not output.exists():
            os.rename(left, output)
        elif not other_files(left):
            remove_output(left)
    for left in _left_beside(output, "tmp"):
        remove_output(left)


def _left_beside(output: Path, kind: str) -> list[Path]:
    """Our own hidden folders of that kind; an empty one is ours that was killed before or after it had its marker."""
    pattern = glob.escape(f".{output.name}.{kind}-") + "[0-9a-f]" * 8
    found = [path for path in output.parent.glob(pattern) if path.is_dir() and not path.is_symlink()]
    return [path for path in found if is_our_output(path) or not any(path.iterdir())]


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
        f"a file that was just written cannot be read back: {what}",
        where=path.name,
        fix="check the disk and run the same command again",
        saved="all finished blocks; the output folder is as it was",
        exit_code=ExitCode.RESOURCES,
    )
