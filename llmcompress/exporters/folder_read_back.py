"""Reads a Hugging Face folder that was just written, and compares its codes, scales and weights with the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmcompress.evaluation.checkpoint_codes import CodedSite, codes_in
from llmcompress.exporters.contents import compressed_modules
from llmcompress.loading.tensors import Tensors
from llmcompress.modules.base import CompressedModule
from llmcompress.modules.quant_linear import quantized_linears
from llmcompress.numerics.quantized import QuantizedTensor, error_in_steps, regrouped
from llmcompress.records.export_report import ReadBack


@torch.no_grad()
def read_folder_back(model: PreTrainedModel, folder: Path, storage_dtype: torch.dtype) -> list[ReadBack]:
    """A row for every tensor that has the same name in the model; experts of transformers 5 have others on disk."""
    stored, read, codes = codes_in(folder), Tensors(), quantized_linears(model)
    rows = []
    for site in stored.coded:
        if isinstance(site, CodedSite) and site.name in codes:
            found = {name: read(each) for name, each in site.tensors.items() if not name.startswith("input_")}
            rows.append(_codes(site, site.unpack(site, found), codes[site.name].quantized))
    own, modules = model.state_dict(), compressed_modules(model)
    for header in stored.dense:
        found_there = read(header)
        expected = _expected(modules, own, header.name, found_there.shape, storage_dtype)
        if expected is not None:
            kind, differing = str(header.dtype).removeprefix("torch."), int((found_there != expected).sum())
            rows.append(
                ReadBack(source=header.name, stored_as=kind, values=expected.numel(), weights_differing=differing)
            )
    return rows


def _codes(site: CodedSite, found: QuantizedTensor, ours: QuantizedTensor) -> ReadBack:
    """Scales are compared as the file's dtype holds them, repeated where its groups are shorter."""
    if found.grid.groups(site.inputs) > ours.grid.groups(site.inputs):
        ours = regrouped(ours, found.grid.group)
    rounds = ours.grid.scales.bits is None
    error = error_in_steps(ours, site.scale_dtype) if rounds and ours.grid.number is None else 0.0
    ours = replace(ours, scale=ours.scale.to(site.scale_dtype) if rounds else ours.scale)
    wide = replace(found, scale=found.scale.float()), replace(ours, scale=ours.scale.float())
    # what is multiplied: a file may divide two-level scales by another power of two
    scales = wide[0].fitted.scale_OG.reshape(-1) != wide[1].fitted.scale_OG.reshape(-1)
    return ReadBack(
        source=site.name,
        stored_as=f"{found.grid.bits}-bit codes",
        values=site.weights,
        codes_differing=int((found.centred_codes() != ours.centred_codes()).sum()),
        scales_differing=int(scales.sum()),
        rounding_in_steps=error,
        weights_differing=int((wide[0].dense() != wide[1].dense()).sum()),
    )


def _expected(
    modules: Mapping[str, CompressedModule], own: Mapping[str, Tensor], name: str, shape: torch.Size, dtype: torch.dtype
) -> Tensor | None:
    """What the file must hold under that name; None where the model has nothing of that name and shape.

    A replaced module is there with tensors of its own, or dequantized; a Conv1D is stored the other way round.
    """
    owner, _, leaf = name.rpartition(".")
    module = modules.get(owner)
    value = own.get(name)
    if module is not None and (value is None or value.shape != shape) and leaf in ("weight", "bias"):
        value = module.dense_weight() if leaf == "weight" else module.dense_bias()
        value = value.T if value is not None and value.shape != shape else value
    if value is None or value.shape != shape:
        return None
    return value.to(dtype) if value.is_floating_point() and value.itemsize > 1 else value
