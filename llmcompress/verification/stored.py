"""Whether the files are those that were written, and hold every tensor of the model, without NaN or Inf."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PretrainedConfig

from llmcompress.evaluation.checkpoint_codes import codes_in
from llmcompress.evaluation.footprint import CACHE_SCALES
from llmcompress.exporters.base import EXPORTERS
from llmcompress.formats.packed_linear import enter_file_forms
from llmcompress.loading.config import read_config
from llmcompress.loading.match import empty_model, match
from llmcompress.loading.plugin import METHOD
from llmcompress.loading.tensors import TensorHeader, Tensors, archived_headers, headers
from llmcompress.modules.manifest import Manifest, apply_manifest
from llmcompress.records.export_report import EXPORT_REPORT
from llmcompress.records.verification import Check
from llmcompress.storage.disk import sha256
from llmcompress.storage.json_file import read_json
from llmcompress.storage.names import CARD, FILES, INDEX, SINGLE
from llmcompress.storage.ownership import written_files

_NAMED = 12
"""Files and tensors listed by name."""


def files(folder: Path) -> Check:
    """The digest of every file that was written, and no other weight file."""
    written = written_files(folder)
    if not written:
        return Check(name="files", result="skipped", found=f"no {FILES}: another program wrote this folder")
    missing = [name for name in written if name not in (CARD, FILES) and not (folder / name).is_file()]
    known = {name: digest for name, digest in written.items() if digest and name != CARD and name not in missing}
    changed = [name for name, digest in known.items() if sha256(folder / name) != digest.sha256]
    added = [path.name for path in folder.glob("*.safetensors") if path.name not in written]
    parts = ((missing, "missing"), (changed, "changed"), (added, "not written by llmcompress"))
    wrong = [f"{len(names)} {what}" for names, what in parts if names]
    if wrong:
        return _failed("files", f"{', '.join(wrong)} of {len(written)} files", [*missing, *changed, *added])
    if not known:
        return Check(name="files", result="skipped", found=f"{FILES} has no digests: an earlier version wrote it")
    return Check(name="files", result="ok", found=f"{len(known)} files have the digests that were written")


def tensors(folder: Path) -> Check:
    """Names and shapes in the weight files against those that config.json implies."""
    if not is_for_transformers(folder):
        return Check(name="tensors", result="skipped", found="the layout of another runtime")
    config, _ = read_config(folder, may_be_quantized=True)
    found, quantization = headers(folder), getattr(config, "quantization_config", None)
    plain = copy.deepcopy(config)
    plain.__dict__.pop("quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method") == METHOD:
        missing, unexpected = _against_manifest(plain, quantization, found)
        if missing or unexpected:
            what = f"{len(missing)} tensors are missing, {len(unexpected)} are unexpected"
            return _failed("tensors", what, [*missing, *unexpected])
    else:
        unused = match(plain, _as_weights(folder)).unused
        if unused:
            return _failed("tensors", f"{len(unused)} tensors are not used by the model", unused)
    return Check(name="tensors", result="ok", found=f"{len(found)} tensors, as config.json implies")


@torch.no_grad()
def finite(folder: Path) -> Check:
    """Every weight, scale and zero point."""
    if not _has_safetensors(folder):
        return Check(name="finite", result="skipped", found="no safetensors: the format of another runtime")
    read, broken, values = Tensors(), list[str](), 0
    for header in _unpacked(folder).values():
        if header.dtype.is_floating_point:
            tensor = read(header)
            wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
            values += wide.numel()
            if not bool(torch.isfinite(wide).all()):
                broken.append(header.name)
    if broken:
        return _failed("finite", f"{len(broken)} tensors have NaN or Inf", broken)
    return Check(name="finite", result="ok", found=f"{values:,} weights and scales, none NaN or Inf")


def is_for_transformers(folder: Path) -> bool:
    """Whether transformers loads it, with llmcompress or without; not what has the layout of another runtime."""
    if not _has_safetensors(folder):
        return False
    if not (folder / EXPORT_REPORT).is_file():
        return True
    target = str(read_json(folder / EXPORT_REPORT, code="report.unreadable").get("target"))
    exporter = EXPORTERS[target]
    return exporter.runtime == "torch" and exporter.cannot_run is None


def _has_safetensors(folder: Path) -> bool:
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def _unpacked(folder: Path) -> dict[str, TensorHeader]:
    """Of an archive the tensors as they are once they are unpacked."""
    found, config = headers(folder), read_json(folder / "config.json").get("quantization_config")
    return archived_headers(found) if isinstance(config, dict) and config.get("archive") else found


def _as_weights(folder: Path) -> dict[str, TensorHeader]:
    """The checkpoint as if its codes were the weights that they stand for."""
    stored = codes_in(folder)
    weights = (
        TensorHeader(f"{site.name}.weight", torch.bfloat16, (site.outputs, site.inputs), folder / SINGLE, 0)
        for site in stored.coded
    )
    dense = (each for each in stored.dense if not each.name.endswith(CACHE_SCALES))
    return {each.name: each for each in (*weights, *dense)}


def _against_manifest(
    config: PretrainedConfig, quantization: dict[str, object], found: dict[str, TensorHeader]
) -> tuple[list[str], list[str]]:
    """The model as our own format describes it, without weights."""
    parts = {name: quantization.get(name) or {} for name in ("modules", "shapes", "attributes")}
    model = empty_model(config)
    with torch.device("meta"):
        apply_manifest(model, Manifest(**parts), torch.bfloat16)  # type: ignore[arg-type]
    enter_file_forms(model)
    state = model.state_dict(keep_vars=True)
    there = {id(tensor) for name, tensor in state.items() if name in found}
    missing = [name for name, tensor in state.items() if name not in found and id(tensor) not in there]
    return missing, [name for name in found if name not in state]


def _failed(name: str, found: str, where: Iterable[str]) -> Check:
    return Check(name=name, result="failed", found=found, where=tuple(where)[:_NAMED])
