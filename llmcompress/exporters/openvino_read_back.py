"""Decodes OpenVINO files again and compares them with the model, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.exporters.openvino_file import IrFile, StoredMatrix
from llmcompress.exporters.openvino_form import matrices
from llmcompress.exporters.openvino_request import GraphRequest
from llmcompress.formats.openvino import plain_scales, unpack
from llmcompress.modules.expression import Tied
from llmcompress.modules.expression_leaves import Leaf, Quantized
from llmcompress.records.export_report import ReadBack

_FOLDED = "folded into the graph"


@torch.no_grad()
def read_back(file: Path, request: GraphRequest, dtype: torch.dtype) -> list[ReadBack]:
    """A row for every matrix and every vector of the model."""
    found = IrFile(file)
    shared = {form.owner for module in request.shapes if isinstance(form := request.form(module), Tied)}
    rows = []
    for module in request.shapes:
        for name, leaf in matrices(request.form(module), module):
            stored = found.matrix(name)
            readers = 2 if module in shared else 1
            rows.append(_missing(name, leaf) if stored is None else _compared(name, leaf, stored, readers, dtype))
    return [*rows, *_vectors(found, request)]


def _compared(name: str, leaf: Leaf, stored: StoredMatrix, readers: int, dtype: torch.dtype) -> ReadBack:
    """`readers`: how many nodes must read it; none of its numbers is right where others do."""
    wired = len(stored.readers) == readers
    if not isinstance(leaf, Quantized) or stored.packed is None:
        weight = leaf.dense_weight().to(dtype).float()
        return ReadBack(
            source=name,
            stored_as=stored.type,
            values=weight.numel(),
            weights_differing=_differing(stored.weight, weight, wired),
        )
    ours, read = leaf.tensor, unpack(stored.packed, leaf.tensor.grid)
    scales = _differing(read.scale, plain_scales(ours))
    if ours.zero_point is not None and read.zero_point is not None:
        scales += _differing(read.zero_point, ours.zero_point)
    dense = replace(ours, scale=ours.scale.float()).dense()
    return ReadBack(
        source=name,
        stored_as=stored.type,
        values=ours.weights,
        codes_differing=_differing(read.codes, ours.codes),
        scales_differing=scales,
        rounding_in_steps=0.0,
        weights_differing=_differing(stored.weight, dense, wired),
    )


def _vectors(found: IrFile, request: GraphRequest) -> Iterator[ReadBack]:
    """Norms and biases, which the frontend reshapes; where it computed something else from one, that is said."""
    for name, ours in request.vectors.items():
        module = name.rpartition(".")[0]
        same = any(torch.equal(each, ours.float().flatten()) for each in found.vectors(module))
        yield ReadBack(
            source=name,
            stored_as="f32" if same else _FOLDED,
            values=ours.numel(),
            weights_differing=0 if same else None,
        )


def _missing(name: str, leaf: Leaf) -> ReadBack:
    count = leaf.shape[0] * leaf.shape[1]
    return ReadBack(source=name, stored_as="nothing", values=count, weights_differing=count)


def _differing(found: Tensor, ours: Tensor, wired: bool = True) -> int:
    """Numbers that are not the same."""
    if not wired or found.shape != ours.shape:
        return ours.numel()
    return int((found != ours).sum())
