"""One tensor as bytes for transfer: entropy-coded without loss, and checked when it is read.

zstandard codes bytes (repetitions, Huffman and finite-state entropy codes); a layout lays them out so that it can:
the high bytes of floats together and the low ones together, fields of 3, 5, 6 or 7 bits one to a byte, and of tensors
with many zeros a bit for every place and then the others. The smallest of what fits is kept.

Source: Han et al., arXiv 1510.00149 (Deep Compression), section 4 (Huffman coding of codes and of sparse indices).
Differs: zeros are a bit mask, whose bytes are entropy-coded, not differences of positions.
"""

from __future__ import annotations

import importlib
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmcompress.errors import CompressError, ExitCode

_MAGIC = b"LCA1"
_LENGTHS = struct.Struct("<4sIH")
"""Magic, checksum of what follows it, length of the header."""
_DTYPES = {
    str(each).removeprefix("torch."): each
    for each in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8)
}
LONGEST_HEADER = 4096
"""Bytes that surely hold the header of an archived tensor."""
_WIDTHS = (3, 5, 6, 7)
"""Of fields that cross bytes."""
LEVEL = 3
"""Of zstandard: there is next to nothing to find but frequencies, and levels up to 22 gain nothing (docs/log.md)."""


class BadArchive(Exception):
    """What is wrong with the bytes of one tensor."""


class Header(NamedTuple):
    """What the beginning of an archived tensor says."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: str
    parts: tuple[int, ...]
    """Bytes of each entropy-coded part."""


def pack(tensor: Tensor) -> Tensor:
    """Its archived form, uint8.

    Raises: CompressError where `zstandard` is missing.
    """
    package, plain = zstandard(), tensor.detach().cpu().contiguous()
    fast = package.ZstdCompressor(level=1)
    layout = min(_layouts(plain), key=lambda each: sum(len(fast.compress(part)) for part in _laid_out(plain, each)))
    coder = package.ZstdCompressor(level=LEVEL, write_checksum=False)
    parts = [coder.compress(part) for part in _laid_out(plain, layout)]
    said = {
        "dtype": str(plain.dtype).removeprefix("torch."),
        "shape": list(plain.shape),
        "layout": layout,
        "parts": [len(part) for part in parts],
    }
    header = json.dumps(said, separators=(",", ":")).encode()
    body = struct.pack("<H", len(header)) + header + b"".join(parts)
    return torch.frombuffer(bytearray(_MAGIC + struct.pack("<I", zlib.crc32(body)) + body), dtype=torch.uint8)


def unpack(archived: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """The tensor that was packed, bit for bit; `shape`: what it must be.

    Raises: BadArchive when the bytes are not what was written; CompressError where `zstandard` is missing.
    """
    data = archived.detach().cpu().contiguous().numpy().tobytes()
    header, start = read_header(data)
    if shape is not None and header.shape != tuple(shape):
        raise BadArchive(f"its shape is {list(header.shape)}, and the model has {list(shape)} there")
    if zlib.crc32(data[8:]) != struct.unpack_from("<I", data, 4)[0]:
        raise BadArchive("its checksum does not fit its bytes")
    package, parts = zstandard(), []
    decoder, most = package.ZstdDecompressor(), 3 * prod(header.shape) * header.dtype.itemsize + 8
    for length in header.parts:
        part = data[start : start + length]
        try:
            if package.frame_content_size(part) > most:
                raise BadArchive("a part would be larger than the tensor")
            parts.append(decoder.decompress(part))
        except package.ZstdError as problem:
            raise BadArchive(f"zstandard cannot decode it: {problem}") from problem
        start += length
    return _put_together(header, parts)


def read_header(data: bytes) -> tuple[Header, int]:
    """What an archived tensor is, from its first bytes, and where its parts begin.

    Raises: BadArchive when they are not the beginning of one.
    """
    try:
        magic, _, length = _LENGTHS.unpack_from(data)
        said: dict[str, Any] = json.loads(data[_LENGTHS.size : _LENGTHS.size + length])
        shape, parts = tuple(map(int, said["shape"])), tuple(map(int, said["parts"]))
        header = Header(_DTYPES[said["dtype"]], shape, str(said["layout"]), parts)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise BadArchive("its header is not that of an archived tensor") from problem
    if magic != _MAGIC:
        raise BadArchive("its first bytes are not those of an archived tensor")
    return header, _LENGTHS.size + length


def zstandard() -> ModuleType:
    """The coder.

    Raises: CompressError where it is not installed.
    """
    try:
        return importlib.import_module("zstandard")
    except ImportError as problem:
        raise CompressError(
            "archive.package",
            "archives need the package `zstandard`, which is not installed",
            fix='pip install "llmcompress[archive]"',
            exit_code=ExitCode.USAGE,
        ) from problem


def _layouts(tensor: Tensor) -> Iterator[str]:
    """Those that can hold it: `bytes`, `planes`, `sparse` or `fields-WIDTH`."""
    yield "bytes"
    if tensor.numel() == 0:
        return
    if tensor.itemsize > 1:
        yield "planes"
        if int((tensor == 0).sum()) > tensor.numel() // 8:
            yield "sparse"
    elif tensor.dtype is torch.uint8 and tensor.dim() == 2:
        yield from (f"fields-{width}" for width in _WIDTHS)


def _laid_out(tensor: Tensor, layout: str) -> list[bytes]:
    """The bytes of a tensor, in parts that are coded one by one."""
    if layout == "bytes":
        return [_as_bytes(tensor).numpy().tobytes()]
    if layout == "planes":
        return _planes(tensor)
    if layout == "sparse":
        # by bits, not by value: -0.0 is no zero here, and comes back as it was
        there = (_as_bytes(tensor).view(-1, tensor.itemsize) != 0).any(1)
        return [_mask_bytes(there), *_planes(tensor.flatten()[there])]
    return [_fields(tensor, int(layout.removeprefix("fields-"))).numpy().tobytes()]


def _put_together(header: Header, parts: Sequence[bytes]) -> Tensor:
    """What `_laid_out` was given.

    Raises: BadArchive when lengths do not fit the shape.
    """
    count, size = prod(header.shape), header.dtype.itemsize
    planes = parts
    if header.layout == "sparse":
        there = _mask(parts[0], count)
        planes, count = parts[1:], int(there.sum())
    if header.layout.startswith("fields-"):
        return _from_fields(parts[0], int(header.layout.removeprefix("fields-")), header)
    wanted = [count * size] if header.layout == "bytes" else [count] * size
    if [len(part) for part in planes] != wanted:
        raise BadArchive("its parts do not have the bytes of its shape")
    found_NB = torch.empty((count, size), dtype=torch.uint8)
    for place, part in enumerate(planes):
        source = torch.frombuffer(bytearray(part), dtype=torch.uint8) if part else torch.empty(0, dtype=torch.uint8)
        if header.layout == "bytes":
            found_NB = source.view(count, size)
        else:
            found_NB[:, place] = source
    values = found_NB.contiguous().view(-1).view(header.dtype)
    if header.layout == "sparse":
        whole = torch.zeros(prod(header.shape), dtype=header.dtype)
        whole[there] = values
        values = whole
    return values.view(header.shape)


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _planes(tensor: Tensor) -> list[bytes]:
    """All first bytes of the numbers, then all second ones, ….: exponents are alike, mantissas are not."""
    bytes_NB = _as_bytes(tensor).view(-1, tensor.itemsize)
    return [bytes_NB[:, place].contiguous().numpy().tobytes() for place in range(tensor.itemsize)]


def _mask_bytes(there: Tensor) -> bytes:
    weights = (2 ** torch.arange(8)).to(torch.uint8)
    padded = torch.nn.functional.pad(there.to(torch.uint8), (0, -len(there) % 8)).view(-1, 8)
    return (padded * weights).sum(1, dtype=torch.uint8).numpy().tobytes()


def _mask(data: bytes, count: int) -> Tensor:
    if len(data) != -(-count // 8):
        raise BadArchive("its mask does not have a bit for every place")
    bits = torch.frombuffer(bytearray(data), dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.reshape(-1)[:count].bool()


def _fields(tensor: Tensor, width: int) -> Tensor:
    """Every row of bytes as fields of that many bits, lowest first, one to a byte; the last one may be cut off."""
    rows, columns = tensor.shape
    bits = (tensor[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).view(rows, 8 * columns)
    padded = torch.nn.functional.pad(bits, (0, -8 * columns % width)).view(rows, -1, width)
    return (padded * (2 ** torch.arange(width)).to(torch.uint8)).sum(-1, dtype=torch.uint8)


def _from_fields(data: bytes, width: int, header: Header) -> Tensor:
    rows, columns = header.shape
    if width not in _WIDTHS or len(data) != rows * -(-8 * columns // width):
        raise BadArchive("its fields do not fit its shape")
    fields = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(rows, -1)
    bits = (fields[..., None] >> torch.arange(width, dtype=torch.uint8) & 1).view(rows, -1)[:, : 8 * columns]
    found: Tensor = (bits.reshape(rows, columns, 8) * (2 ** torch.arange(8)).to(torch.uint8)).sum(-1, dtype=torch.uint8)
    return found
