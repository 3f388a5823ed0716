"""Local text files and tables → rows with labels that a user can find (`line 7`)."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from llmcompress.calibration.records import BadRow
from llmcompress.errors import CompressError

Rows = Iterator[tuple[str, Any]]

_UNPACK: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".gz": gzip.decompress}


def is_text_file(name: str) -> bool:
    """Whether a file of that name can be read here."""
    return _kind(Path(name)) in _READERS


def rows_of_file(path: Path, *, where: str) -> Rows:
    """Labelled rows of a .txt (one row), .jsonl, .json, .csv or .parquet; the first three also as .xz or .gz.

    Rows that cannot be read come as `BadRow`, so that the caller decides whether to stop.

    Raises: CompressError when the file as a whole cannot be read.
    """
    reader = _READERS.get(_kind(path))
    if reader is None:
        raise CompressError(
            "data.file-type",
            f"{path.name}: unsupported file type for text",
            where=where,
            fix=f"use one of {', '.join(_READERS)} (text formats may be compressed as .xz or .gz)",
        )
    try:
        yield from reader(path, where)
    except OSError as failure:
        raise CompressError("data.unreadable", f"{path}: {failure.strerror or failure}", where=where) from None


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _UNPACK:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _bytes(path: Path, where: str) -> bytes:
    content = path.read_bytes()
    unpack = _UNPACK.get(path.suffix.lower())
    if unpack:
        try:
            content = unpack(content)
        except (lzma.LZMAError, EOFError, gzip.BadGzipFile) as failure:
            raise CompressError("data.unreadable", f"{path.name}: damaged archive ({failure})", where=where) from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CompressError(
            "data.encoding",
            f"{path.name}: the text is UTF-16, not UTF-8",
            where=where,
            fix=f"convert it: iconv -f utf-16 -t utf-8 {path.name} > utf8-{path.name}",
        )
    return content.removeprefix(b"\xef\xbb\xbf")


def _decoded(content: bytes) -> str:
    """UTF-8 text with plain line ends.

    Raises: BadRow naming the first byte that is not UTF-8; line and byte are counted from 1.
    """
    try:
        return content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as failure:
        line_start = content.rfind(b"\n", 0, failure.start) + 1
        line = content.count(b"\n", 0, failure.start) + 1
        at = f"line {line}, byte {failure.start - line_start + 1}"
        guess = content[failure.start : failure.start + 1].decode("latin-1")
        raise BadRow(
            f"not UTF-8 at {at} (0x{content[failure.start]:02x}); read as Latin-1 it would be {guess!r}"
        ) from None


def _text(path: Path, where: str) -> str:
    """The whole file as text; here nothing can be skipped."""
    try:
        return _decoded(_bytes(path, where))
    except BadRow as bad:
        raise CompressError(
            "data.encoding",
            f"{path.name}: {bad}",
            where=where,
            fix=f"convert it to UTF-8: iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}",
        ) from None


def _txt(path: Path, where: str) -> Rows:
    yield "line 1", _text(path, where)


def _jsonl(path: Path, where: str) -> Rows:
    """Each line on its own, so that one bad line costs one row."""
    for number, line in enumerate(_bytes(path, where).split(b"\n"), start=1):
        if line.strip():
            yield f"line {number}", _json_line(line)


def _json_line(line: bytes) -> Any:
    try:
        return json.loads(_decoded(line))
    except BadRow as bad:
        return BadRow(str(bad).replace("line 1, ", ""))  # the label names the line of the file
    except json.JSONDecodeError as failure:
        return BadRow(f"invalid JSON at column {failure.colno}: {failure.msg}")
    except (RecursionError, ValueError):
        return BadRow("JSON that cannot be read: a number with too many digits, or too many nested lists")


def _json(path: Path, where: str) -> Rows:
    try:
        content = json.loads(_text(path, where))
    except json.JSONDecodeError as failure:
        raise CompressError(
            "data.bad-json",
            f"{path.name}: line {failure.lineno}, column {failure.colno}: invalid JSON: {failure.msg}",
            where=where,
            fix="correct that line; one JSON record per line belongs in a .jsonl file",
        ) from None
    except (RecursionError, ValueError):
        what = f"{path.name}: JSON that cannot be read: a number with too many digits, or too many nested lists"
        raise CompressError("data.bad-json", what, where=where, fix="write one record per line, as .jsonl") from None
    if not isinstance(content, list):
        what = f"{path.name}: expected a list of records"
        raise CompressError("data.bad-json", what, where=where, fix="write [{...}, {...}] or .jsonl")
    yield from ((f"record {number}", row) for number, row in enumerate(content, start=1))


def _csv(path: Path, where: str) -> Rows:
    """Every field as text: "NA" and "007" are words here."""
    text = _text(path, where)
    with _long_fields():
        lines = csv.reader(StringIO(text, newline=""), strict=True)
        header: list[str] | None = None
        end = 0
        while True:
            start = end + 1
            try:
                fields = next(lines, None)
            except csv.Error as failure:
                what = f"{path.name}: line {start}: {failure}"
                raise CompressError("data.bad-csv", what, where=where, fix="check the quotes of that row") from None
            end = lines.line_num
            if fields is None:
                return
            if header is None:
                header = fields
            elif len(fields) == len(header):
                yield f"line {start}", dict(zip(header, fields, strict=True))
            elif fields:
                what = f"{len(fields)} fields, the header has {len(header)}; quote text that contains commas"
                yield f"line {start}", BadRow(what)


@contextmanager
def _long_fields() -> Iterator[None]:
    """A document may be longer than the 128 kB that Python's csv allows in a field."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, where: str) -> Rows:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as failure:
        raise CompressError("data.unreadable", f"{path.name}: not a Parquet file ({failure})", where=where) from None
    number = 0
    for batch in table.iter_batches(batch_size=1024):
        for record in batch.to_pylist():
            number += 1
            yield f"row {number}", record


_READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
