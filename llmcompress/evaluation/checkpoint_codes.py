"""Finds the quantized tensors of a saved model from its config and the headers of its weight files.

O = outputs, I = inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.errors import CompressError
from llmcompress.evaluation.checkpoint_codes_bnb import BnbSite, bnb_sites
from llmcompress.formats import compressed_tensors, gptq, packed, tensorrt_llm
from llmcompress.formats.named import Named
from llmcompress.formats.tensorrt_llm import Algorithm
from llmcompress.loading.tensors import TensorHeader, Tensors, archived_headers, headers
from llmcompress.modules.base import MODULES
from llmcompress.modules.scheme import Scheme, named_scheme
from llmcompress.numerics.formats import E2M1, E4M3, POWER_OF_TWO, SINGLE, STORED, TWO_LEVEL
from llmcompress.numerics.grid import Grid
from llmcompress.numerics.quantized import QuantizedTensor
from llmcompress.records.report import REPORT
from llmcompress.storage.json_file import read_json


@dataclass(frozen=True)
class CodedSite:
    """One quantized linear of a checkpoint."""

    name: str
    outputs: int
    inputs: int
    grid: Grid
    """As stored in the file: a 3-bit grid may be in 4-bit fields, and zero points may be part of the codes."""
    scheme: Scheme | None
    """The grid; None for checkpoints of other tools, which store only the field widths."""
    tensors: Mapping[str, TensorHeader]
    """By their last name: `weight_packed`, `scale`, …"""
    unpack: Callable[[CodedSite, Named], QuantizedTensor]
    """By the format."""

    @property
    def weights(self) -> int:
        """Number of quantized weights."""
        return self.outputs * self.inputs

    @property
    def code_bits(self) -> Fraction:
        """Bits of one code without padding."""
        return (self.scheme.weights if self.scheme else self.grid).own_bits

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of the scales in the file."""
        return next(self.tensors[name].dtype for name in ("scale", "weight_scale", "scales") if name in self.tensors)

    @property
    def ideal_bits(self) -> int:
        """Bits of codes without padding, scales and zero points."""
        scale_bits = 8 * self.scale_dtype.itemsize
        extra = 8 * sum(tensor.bytes for name, tensor in self.tensors.items() if name.startswith("input_"))
        grid = self.scheme.weights if self.scheme else self.grid
        return grid.code_bits(self.weights) + grid.scale_bits(self.outputs, self.inputs, scale_bits) + extra

    def codes(self, read: Tensors) -> Tensor:
        """O×I int16: each code less its zero point (or the code of 0), so 0 is a weight of zero."""
        found = {name: read(tensor) for name, tensor in self.tensors.items() if not name.startswith("input_")}
        return self.unpack(self, found).centred_codes()


@dataclass(frozen=True)
class StoredCodes:
    """A checkpoint divided into quantized and other tensors."""

    folder: Path
    format: str
    """`plain`, or the `quant_method` of its config."""
    coded: tuple[CodedSite | BnbSite, ...]
    dense: tuple[TensorHeader, ...]


def codes_in(folder: Path) -> StoredCodes:
    """Sort the tensors of a folder; reads no weight.

    Raises: CompressError when the files are damaged, or quantized in a format that is none of ours,
    compressed-tensors, GPTQ and bitsandbytes.
    """
    found = headers(folder)
    config = read_json(folder / "config.json").get("quantization_config") or {}
    method = str(config.get("quant_method", "plain") if isinstance(config, dict) else config)
    if isinstance(config, dict) and config.get("archive"):
        found = archived_headers(found)
    if method == "plain":
        return StoredCodes(folder, method, (), tuple(found.values()))
    if method not in _READERS:
        raise CompressError(
            "footprint.format",
            f"cannot read quantized weights of the format {method!r}",
            where=f"{folder}/config.json",
            fix=f"use a checkpoint in plain, {' or '.join(_READERS)} format",
        )
    try:
        coded: tuple[CodedSite | BnbSite, ...] = tuple(_READERS[method](config, found, _schemes(folder)))
    except CompressError:
        raise
    except Exception as problem:  # the file is not ours and may hold anything
        raise CompressError(
            "footprint.damaged",
            f"its quantization config does not fit its weight files: {type(problem).__name__}: {problem}",
            where=f"{folder}/config.json",
            fix="get the whole folder again",
        ) from problem
    taken = {tensor.name for site in coded for tensor in site.tensors.values()}
    return StoredCodes(folder, method, coded, tuple(tensor for name, tensor in found.items() if name not in taken))


def _from_manifest(
    config: Mapping[str, Any], found: Mapping[str, TensorHeader], _: Mapping[str, Scheme]
) -> Iterator[CodedSite]:
    for name, spec in _quantized_specs(config.get("modules", {})):
        scheme, tensors = named_scheme(str(spec["scheme"])), _at(name, found, packed.NAMES)
        yield CodedSite(name, int(spec["outputs"]), int(spec["inputs"]), scheme.weights, scheme, tensors, _packed)


def _packed(site: CodedSite, found: Named) -> QuantizedTensor:
    assert site.scheme is not None
    return packed.unpack(found, site.scheme, site.inputs, torch.float32).tensor


def _quantized_specs(modules: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every quantized linear of a manifest, those that are parts of other modules too."""
    for name, spec in modules.items():
        if isinstance(spec, Mapping):
            kind = str(spec.get("type"))
            if kind in MODULES and MODULES[kind].holds_codes:
                yield prefix + name, spec
            else:
                yield from _quantized_specs(spec, f"{prefix}{name}.")


def _from_compressed_tensors(
    config: Mapping[str, Any], found: Mapping[str, TensorHeader], schemes: Mapping[str, Scheme]
) -> Iterator[CodedSite]:
    read = Tensors()
    widths = sorted(
        {int(group["weights"]["num_bits"]) for group in config["config_groups"].values() if group.get("weights")}
    )
    for scale in found:
        name, _, leaf = scale.rpartition(".")
        if leaf != "weight_scale":
            continue
        tensors = _at(name, found, compressed_tensors.NAMES)
        if "weight_shape" in tensors:
            outputs, inputs = read(tensors["weight_shape"]).tolist()
        else:
            codes = tensors.get("weight", tensors.get("weight_packed"))
            assert codes is not None
            outputs, inputs = codes.shape[0], codes.shape[1] * (1 if "weight" in tensors else 2)
        yield CodedSite(
            name, outputs, inputs, _grid(tensors, inputs, widths), schemes.get(name), tensors, _compressed_tensors
        )


def _compressed_tensors(site: CodedSite, found: Named) -> QuantizedTensor:
    return compressed_tensors.unpack(found, site.grid, torch.float32)


def _grid(tensors: Mapping[str, TensorHeader], inputs: int, widths: Sequence[int]) -> Grid:
    """The grid, as far as dtypes and shapes tell; `widths` are the candidates from the config, ascending."""
    scale = tensors["weight_scale"]
    group = inputs // scale.shape[-1] if len(scale.shape) > 1 else None
    if "weight_shape" in tensors:
        words = tensors["weight_packed"].shape[1]
        bits = next(width for width in widths if -(-inputs * width // 32) == words)
        return Grid(bits, "weight_zero_point" not in tensors, group)
    kind = SINGLE if len(scale.shape) == 1 else POWER_OF_TWO if scale.dtype == torch.uint8 else STORED
    if "weight_packed" in tensors:
        return Grid.of(E2M1, group, TWO_LEVEL if "weight_global_scale" in tensors else kind)
    if tensors["weight"].dtype == torch.float8_e4m3fn:
        return Grid.of(E4M3, group, kind)
    return Grid(8, "weight_zero_point" not in tensors, group)


def _from_gptq(
    config: Mapping[str, Any], found: Mapping[str, TensorHeader], schemes: Mapping[str, Scheme]
) -> Iterator[CodedSite]:
    if config.get("desc_act"):
        raise CompressError(
            "footprint.format", "its groups are not consecutive inputs (`desc_act`)", fix="use a checkpoint without it"
        )
    for weight in found:
        name, _, leaf = weight.rpartition(".")
        if leaf != "qweight":
            continue
        tensors = _at(name, found, gptq.NAMES)
        said = {**config, **_override(config.get("dynamic") or {}, name)}
        words, outputs = tensors["qweight"].shape
        inputs, groups = words * 32 // int(said["bits"]), tensors["scales"].shape[0]
        version: gptq.Version = 2 if config.get("checkpoint_format") == "gptq_v2" else 1
        layout = gptq.Layout(int(said["bits"]), None if groups == 1 else inputs // groups, bool(said["sym"]), version)
        yield CodedSite(name, outputs, inputs, layout.grid, schemes.get(name), tensors, partial(_gptq, layout))


def _override(dynamic: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """What the first pattern that fits a linear says of it."""
    fitting = (said for pattern, said in dynamic.items() if re.match(pattern.removeprefix("+:"), name))
    return next(fitting, {})


def _gptq(layout: gptq.Layout, _: CodedSite, found: Named) -> QuantizedTensor:
    return gptq.unpack(found, layout, torch.float32)


def _from_modelopt(
    config: Mapping[str, Any], found: Mapping[str, TensorHeader], schemes: Mapping[str, Scheme]
) -> Iterator[CodedSite]:
    """What TensorRT-LLM reads; every linear may have an algorithm of its own."""
    layers, common = config.get("quantized_layers") or {}, config["quant_algo"]
    for scale in found:
        name, _, leaf = scale.rpartition(".")
        if leaf == "weight_scale":
            algorithm = layers[name]["quant_algo"] if layers else common
            yield _tensorrt_llm_site(name, algorithm, found, schemes)


def _tensorrt_llm_site(
    name: str, algorithm: Algorithm, found: Mapping[str, TensorHeader], schemes: Mapping[str, Scheme]
) -> CodedSite:
    tensors = _at(name, found, tensorrt_llm.NAMES)
    outputs, inputs, group = tensorrt_llm.sizes({leaf: each.shape for leaf, each in tensors.items()}, algorithm)
    scheme = schemes.get(name) or tensorrt_llm.scheme_of(algorithm)
    unpack = partial(_tensorrt_llm, algorithm)
    return CodedSite(name, outputs, inputs, tensorrt_llm.grid_of(algorithm, group), scheme, tensors, unpack)


def _tensorrt_llm(algorithm: Algorithm, _: CodedSite, found: Named) -> QuantizedTensor:
    return tensorrt_llm.unpack(found, algorithm)


def _from_bitsandbytes(
    _: Mapping[str, Any], found: Mapping[str, TensorHeader], __: Mapping[str, Scheme]
) -> Iterator[BnbSite]:
    return bnb_sites(found)


_Reader = Callable[
    [Mapping[str, Any], Mapping[str, TensorHeader], Mapping[str, Scheme]], Iterator[CodedSite] | Iterator[BnbSite]
]
_READERS: Mapping[str, _Reader] = {
    "llmcompress": _from_manifest,
    "compressed-tensors": _from_compressed_tensors,
    "gptq": _from_gptq,
    "bitsandbytes": _from_bitsandbytes,
    "modelopt": _from_modelopt,
}


def _at(name: str, found: Mapping[str, TensorHeader], leaves: Set[str]) -> dict[str, TensorHeader]:
    """The tensors of a quantized linear, without its bias."""
    there = {leaf: found.get(f"{name}.{leaf}") for leaf in sorted(leaves)}
    return {leaf: tensor for leaf, tensor in there.items() if tensor is not None}


def _schemes(folder: Path) -> dict[str, Scheme]:
    """The grids named in our report: a 3-bit grid is stored in 4-bit fields, and the files cannot tell."""
    if not (folder / REPORT).is_file():
        return {}
    rows = read_json(folder / REPORT).get("sites", [])
    return {row["site"]: named_scheme(row["scheme"]) for row in rows if row.get("scheme")}
