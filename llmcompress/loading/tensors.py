"""Headers of safetensors files: names, dtypes and shapes; and their weights one by one."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llmcompress.errors import CompressError
from llmcompress.formats import archive
from llmcompress.loading.files import shortened_list, weight_files
from llmcompress.storage.names import INDEX

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODE_DTYPES = (torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)
"""A weight stored in one of these is a quantized code."""
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
"""In which the library writes tensors."""
_LARGEST_HEADER = 100_000_000
"""The format's own limit."""


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a checkpoint."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    bytes: int
    archived: bool = False
    """Whether the file holds its archived form (`formats/archive.py`); dtype and shape are the tensor's own."""


def headers(folder: Path, *, how_to_get_again: str = "delete it and download it again") -> dict[str, TensorHeader]:
    """Every tensor of the checkpoint in the folder, by name, in the order of the files.

    Raises: CompressError naming every file that is missing, damaged, ambiguous or outside the folder.
    """
    files, listed = weight_files(folder, how_to_get_again=how_to_get_again)
    found: dict[str, TensorHeader] = {}
    broken: list[str] = []
    for file in files:
        try:
            tensors = read_header(file)
        except BadFile as problem:
            broken.append(f"{file.name}: {problem}")
            continue
        found |= {name: header for name, header in tensors.items() if listed.get(name, file.name) == file.name}
    if broken:
        raise CompressError(
            "model.damaged-file", "weight files are damaged", where="; ".join(broken), fix=how_to_get_again
        )
    missing = sorted(f"{name} (expected in {file})" for name, file in listed.items() if name not in found)
    if missing:
        raise CompressError(
            "model.missing-tensor",
            f"{len(missing)} tensors listed in {INDEX} are not in the files",
            where=shortened_list(missing),
            fix=f"the file does not belong to this index: {how_to_get_again}",
        )
    return found


class BadFile(Exception):
    """What is wrong with one safetensors file."""


def read_header(file: Path) -> dict[str, TensorHeader]:
    """The tensors of one safetensors file.

    Raises: BadFile when the header is not one, or the file's length does not fit it.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise BadFile(f"{size} bytes; a safetensors file has at least 8")
        length = struct.unpack("<Q", start)[0]
        if length > _LARGEST_HEADER:
            raise BadFile("its first bytes are not those of a safetensors file")
        if length > size - 8:
            raise BadFile(f"{size:,} bytes; its header alone has {length + 8:,}")
        text = stream.read(length)
    try:
        entries = json.loads(text)
        found = {name: _tensor(name, entry, file) for name, entry in entries.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError):
        raise BadFile("its header is not that of a safetensors file") from None
    if size != 8 + length + end:
        raise BadFile(f"{size:,} bytes; according to its header it has {8 + length + end:,}")
    return found


def _tensor(name: str, entry: dict[str, Any], file: Path) -> TensorHeader:
    if entry["dtype"] not in DTYPES:
        raise BadFile(f"tensor {name} has dtype {entry['dtype']}, which is not supported")
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(length) for length in entry["shape"])
    begin, end = entry["data_offsets"]
    size = prod(shape) * dtype.itemsize
    if begin < 0 or end - begin != size:
        raise BadFile(f"tensor {name} of shape {list(shape)} takes {size:,} bytes, not {end - begin:,}")
    return TensorHeader(name, dtype, shape, file, size)


class Tensors:
    """Reads tensors of a checkpoint one by one; at most one file is open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: Any = None

    def __call__(self, header: TensorHeader) -> Tensor:
        """The tensor that a header tells of."""
        self._open(header.file)
        found: Tensor = self._file.get_tensor(header.name)
        return archive.unpack(found) if header.archived else found

    def start(self, header: TensorHeader, count: int) -> bytes:
        """The first numbers of a tensor of bytes."""
        self._open(header.file)
        found: Tensor = self._file.get_slice(header.name)[:count]
        return found.numpy().tobytes()

    def _open(self, file: Path) -> None:
        if self._path != file:
            self._file = safe_open(file, framework="pt")
            self._path = file


def archived_headers(found: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """The same tensors as they are once they are unpacked; `bytes` stays what they take in the file.

    Raises: CompressError where one is no archived tensor.
    """
    read, headers_now = Tensors(), {}
    for name, header in found.items():
        try:
            said, _ = archive.read_header(read.start(header, archive.LONGEST_HEADER))
        except archive.BadArchive as problem:
            raise CompressError(
                "archive.damaged",
                f"an archived tensor cannot be unpacked: {problem}",
                where=f"{name} in {header.file.name}",
                fix="get the whole folder again",
            ) from problem
        headers_now[name] = TensorHeader(name, said.dtype, said.shape, header.file, header.bytes, archived=True)
    return headers_now


def write_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, list[str]]:
    """The beginning of a safetensors file with these tensors, and the order in which their data follow.

    Both are those of the library: wide types first, so that everything is aligned.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(tensors, key=lambda name: (_ORDER.index(names[tensors[name][0]]), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order
