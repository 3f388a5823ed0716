"""Writes a GGUF file with the `gguf` package, one tensor in memory at a time, and reads it back to compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from llmcompress.calibration.offloading import WeightStore
from llmcompress.exporters.checkpoint import block_of
from llmcompress.exporters.gguf_architectures import Setting
from llmcompress.exporters.gguf_package import gguf_package
from llmcompress.exporters.gguf_tensors import FileTensor
from llmcompress.formats import gguf
from llmcompress.records.export_report import ReadBack

_ROWS = 4096
"""Rows that are decoded at a time."""


def write_file(
    path: Path,
    settings: Mapping[str, Setting],
    tensors: Sequence[FileTensor],
    model: nn.Module,
    weights_at: WeightStore,
) -> int:
    """Write it; the bytes of all tensors. Weights of a block are offloaded again once they are written."""
    package = gguf_package()
    architecture = str(settings["general.architecture"])
    writer = package.GGUFWriter(None, architecture)
    for key, value in settings.items():
        if key != "general.architecture":  # the writer has it already
            _add(writer, key, value)
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(tensors))
    for each in tensors:
        kind = package.GGMLQuantizationType[each.type]
        shape = package.quant_shape_to_byte_shape(each.shape, kind)
        writer.add_tensor_info(each.name, shape, numpy.dtype(numpy.uint8), prod(shape), raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    written = 0
    for block, members in groupby(tensors, key=lambda each: block_of(each.source)):
        for each in members:
            data = each.make()
            writer.write_tensor_data(data.cpu().numpy())
            written += data.nbytes
        if block:
            name = block.removesuffix(".")
            weights_at.leave(name, model.get_submodule(name))
    writer.close()
    return written


def read_back(path: Path, tensors: Sequence[FileTensor]) -> list[ReadBack]:
    """Decode every tensor of the file again, by our layouts and by the package's, and compare with the model."""
    package = gguf_package()
    found = {str(each.name): each for each in package.GGUFReader(path).tensors}
    assert found.keys() == {each.name for each in tensors}
    return [_compared(each, found[each.name]) for each in tensors]


def _compared(tensor: FileTensor, found: Any) -> ReadBack:
    codes = scales = None
    error: float | None = None
    if tensor.codes is not None:
        ours, kind = tensor.codes(), next(each for each in gguf.TYPES if each.name == tensor.type)
        codes, scales = gguf.differing(gguf.unpack(torch.from_numpy(_rows(found)), kind), ours)
        error = gguf.error_in_steps(ours, kind)
    return ReadBack(
        source=tensor.source,
        stored_as=tensor.type,
        values=prod(tensor.shape),
        codes_differing=codes,
        scales_differing=scales,
        rounding_in_steps=error,
        weights_differing=None if tensor.values is None else _weights_differing(found, tensor.values()),
    )


def _weights_differing(found: Any, values: Tensor) -> int:
    """Numbers that the package decodes differently, bit for bit."""
    rows, data = values.reshape(-1, values.shape[-1]), _rows(found)
    differing = 0
    for start in range(0, len(rows), _ROWS):
        piece = gguf_package().dequantize(numpy.array(data[start : start + _ROWS]), found.tensor_type)
        differing += int((torch.from_numpy(piece) != rows[start : start + _ROWS]).sum())
    return differing


def _rows(found: Any) -> Any:
    """Its data, the matrices of experts one below the other."""
    return numpy.array(found.data).reshape(-1, found.data.shape[-1])


def _add(writer: Any, key: str, value: Setting) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)


def _file_type(tensors: Sequence[FileTensor]) -> int:
    """ggml's name for the file: after the type of most numbers."""
    package = gguf_package()
    counts: Counter[str] = Counter()
    for each in tensors:
        counts[each.type] += prod(each.shape) if len(each.shape) > 1 else 0
    most = counts.most_common(1)[0][0]
    names = package.LlamaFileType.__members__
    candidates = (f"MOSTLY_{most}", f"ALL_{most}", "MOSTLY_MXFP4_MOE")
    return int(next(names[name] for name in candidates if name in names))
