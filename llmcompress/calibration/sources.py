"""Text sources: bundled texts, local files, Hub datasets; read once, with a fingerprint of the content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from llmcompress.calibration.hub_datasets import HubPart, hub_rows
from llmcompress.calibration.local_files import is_text_file, rows_of_file
from llmcompress.calibration.records import Contents, Format, Message, contents_of
from llmcompress.errors import CompressError, ExitCode
from llmcompress.loading.source import IN_MEMORY
from llmcompress.storage.paths import from_home, is_there

JOINER = "\n\n"
"""Stands between documents wherever they are read as one text."""

SHORTEST_PARAGRAPH = 40
"""Characters; shorter paragraphs (headings, `Chapter 2`) may stand in two texts by chance."""


@dataclass(frozen=True)
class Texts:
    """The contents of one source: documents, or conversations that a chat template will render."""

    name: str
    """For reports; the file name only, never a path."""
    documents: tuple[str, ...]
    conversations: tuple[tuple[Message, ...], ...]
    fingerprint: str
    """sha256 of the content read."""
    skipped: int = 0
    """Rows that could not be read and were skipped (`skip_bad_rows`)."""
    bounded: bool = False
    """Whether a dataset was streamed, and no further than enough."""

    @property
    def kind(self) -> Literal["text", "chat"]:
        """What the rows were."""
        return "chat" if self.conversations else "text"


@dataclass(frozen=True)
class TextSource:
    """Where a text comes from: `builtin:NAME`, a local file or dataset folder, or a Hub dataset and a part of it."""

    name: str
    split: str = "train"
    config: str | None = None
    column: str | None = None
    """The column with the text; None: found by its usual names."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset; None: its newest, or that of the short name."""


def read_texts(
    source: TextSource,
    *,
    format: Format = "auto",
    skip_bad_rows: bool = False,
    max_characters: int | None = None,
    where: str = "",
) -> Texts:
    """Everything that a source holds.

    `max_characters` bounds what is taken from a dataset that is streamed; local text is read whole.

    Raises: CompressError when the source cannot be found or read, or holds nothing (`data.empty`).
    """
    rows, name, limit = rows_of_source(source, max_characters=max_characters, where=where)
    row_where = f"{where}: {source.name}" if where else source.name
    found = contents_of(
        rows, column=source.column, format=format, skip_bad_rows=skip_bad_rows, where=row_where, max_characters=limit
    )
    return replace(texts_of(found, name, where=where), bounded=limit is not None)


def texts_of(found: Contents, name: str, *, where: str) -> Texts:
    """What was read, with a fingerprint of it.

    Raises: CompressError `data.empty` when it is nothing.
    """
    if not any(text.strip() for text in found.documents) and not found.conversations:
        left_out = f"; {found.skipped} unreadable rows were skipped" if found.skipped else ""
        what = f"{name}: no usable samples, the source is empty{left_out}"
        raise CompressError("data.empty", what, where=where, fix="use another source")
    conversations = tuple(tuple(messages) for messages in found.conversations)
    fingerprint = _fingerprint(found.documents or conversations)
    return Texts(name, tuple(found.documents), conversations, fingerprint, found.skipped)


def check_source(name: str, *, where: str) -> None:
    """That a bundled text or a local file of that name is there; Hub datasets are not asked for.

    Raises: CompressError when it is not.
    """
    if name.startswith(IN_MEMORY):
        what = f"the data called {name} were handed over in Python: they are in no file"
        fix = "hand the same data over again as `calibration`, or name a file as `calibration.source`"
        raise CompressError("data.in-memory", what, where=where, fix=fix, exit_code=ExitCode.USAGE)
    if name.startswith("builtin:"):
        _check_builtin(name.removeprefix("builtin:"), where)
    elif not is_there(from_home(name)) and _looks_like_a_path(name):
        raise CompressError("data.not-found", f"{name}: no such file", where=where, fix="check the path")


def bytes_of_text(name: str) -> int | None:
    """Size of a bundled text or a local file, which is not opened; None for anything else."""
    bundled = resources.files("llmcompress").joinpath("builtin", f"{name.removeprefix('builtin:')}.txt")
    path = Path(str(bundled)) if name.startswith("builtin:") else from_home(name)
    return path.stat().st_size if is_there(path) and path.is_file() else None


def builtin_names() -> list[str]:
    """The bundled texts."""
    files = resources.files("llmcompress").joinpath("builtin").iterdir()
    return sorted(file.name.removesuffix(".txt") for file in files if file.name.endswith(".txt"))


def paragraph_hashes(texts: Iterable[str]) -> frozenset[int]:
    """One number for every paragraph long enough to be told apart, whatever its spacing."""
    found = (" ".join(line.split()) for text in texts for line in text.split("\n"))
    return frozenset(_hash(line) for line in found if len(line) >= SHORTEST_PARAGRAPH)


def overlap_warning(
    calibration: frozenset[int], evaluation: frozenset[int], *, calibration_name: str, evaluation_name: str
) -> str | None:
    """A warning when text was calibrated on and is measured too, from the paragraph hashes of both."""
    shared = len(calibration & evaluation)
    if not shared:
        return None
    return (
        f"{shared} of {len(evaluation)} paragraphs of {evaluation_name} are also in the calibration text "
        f"{calibration_name}: the perplexity is too optimistic"
    )


def rows_of_source(
    source: TextSource, *, max_characters: int | None = None, where: str = ""
) -> tuple[Iterator[tuple[str, Any]], str, int | None]:
    """Labelled rows (a text, a mapping, messages, or a `BadRow`), a name for reports, and the limit that applies.

    With `max_characters` a large Hub dataset is downloaded as far as the caller reads. Raises as `read_texts` does.
    """
    if source.name.startswith("builtin:"):
        return iter([("the text", _builtin(source.name.removeprefix("builtin:"), where))]), source.name, None
    check_source(source.name, where=where)
    path = from_home(source.name)
    if is_there(path) and path.is_file():
        return rows_of_file(path, where=where), path.name, None
    part = HubPart(source.split, source.config, source.revision)
    rows = hub_rows(source.name, part, max_characters=max_characters, where=where)
    return rows, f"{path.name if path.is_dir() else source.name}:{source.split}", max_characters


def _looks_like_a_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or is_text_file(source)


def _check_builtin(name: str, where: str) -> None:
    if name not in builtin_names():
        raise CompressError(
            "data.not-found",
            f"there is no bundled text {name!r}",
            where=where,
            fix=f"use one of {', '.join(f'builtin:{known}' for known in builtin_names())}",
            exit_code=ExitCode.USAGE,
        )


def _builtin(name: str, where: str) -> str:
    _check_builtin(name, where)
    return resources.files("llmcompress").joinpath("builtin", f"{name}.txt").read_text(encoding="utf-8")


def _fingerprint(contents: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for content in contents:
        # JSON marks where one document ends and the next begins
        digest.update(json.dumps(content, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _hash(paragraph: str) -> int:
    return int.from_bytes(hashlib.blake2b(paragraph.encode("utf-8", "surrogatepass"), digest_size=8).digest())
