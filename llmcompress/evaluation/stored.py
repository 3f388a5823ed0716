"""Which tensors of a saved model are codes, read from its config and the headers of its weight files.

O = outputs, I = inputs, G = groups of inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.errors import CompressError
from llmcompress.evaluation.stored_bnb import BnbSite, bnb_sites
from llmcompress.loading.files import read_json
from llmcompress.loading.tensors import TensorHeader, Tensors, headers
from llmcompress.modules.base import MODULES
from llmcompress.modules.scheme import Scheme, named_scheme
from llmcompress.numerics.packing import unpack_bits
from llmcompress.records.report import REPORT

_LABELS = {"weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "input_scale", "scale", "zero_point"}
_LABELS |= {"shared_scale", "weight_global_scale", "input_global_scale"}  # of scales in two levels


@dataclass(frozen=True)
class CodedSite:
    """One quantized linear of a checkpoint."""

    name: str
    outputs: int
    inputs: int
    field_bits: int
    """Of one code in the file."""
    group: int
    """Inputs that share a scale."""
    scheme: Scheme | None
    """None: a folder of others, which says no more than its fields."""
    tensors: Mapping[str, TensorHeader]
    """By their last name: `weight_packed`, `scale`, …"""

    @property
    def weights(self) -> int:
        """How many the codes stand for."""
        return self.outputs * self.inputs

    @property
    def code_bits(self) -> int:
        """Of one code at its own width."""
        return self.scheme.weights.bits if self.scheme else self.field_bits

    @property
    def ideal_bits(self) -> int:
        """Codes at their own width, scales and zero points."""
        scale = next(tensor for name, tensor in self.tensors.items() if name in ("scale", "weight_scale"))
        scale_bits = 8 * scale.dtype.itemsize
        extra = 8 * sum(tensor.bytes for name, tensor in self.tensors.items() if name.startswith("input_"))
        if self.scheme:
            return round(self.weights * self.scheme.bits_per_weight(self.outputs, self.inputs, scale_bits)) + extra
        has_zero_points = not {"zero_point", "weight_zero_point"}.isdisjoint(self.tensors)
        groups, extra = prod(scale.shape), extra + 32 * ("weight_global_scale" in self.tensors)
        return self.weights * self.field_bits + groups * (scale_bits + self.field_bits * has_zero_points) + extra

    def codes(self, read: Tensors) -> Tensor:
        """O×I int16: each code less its zero point (or the code of 0), so 0 is a weight of zero."""
        codes_OI = self._fields("weight" if "weight" in self.tensors else "weight_packed", read, self.inputs)
        name = next((name for name in ("zero_point", "weight_zero_point") if name in self.tensors), None)
        if name is None:
            number = self.scheme.weights.number if self.scheme else None
            return codes_OI if number is None else codes_OI - number.encode(torch.zeros(1)).to(torch.int16)
        zero = self.tensors[name]
        if zero.dtype == torch.int32:
            low = -(2 ** (self.field_bits - 1))
            packed_GB = read(zero).T.contiguous().view(torch.uint8)
            zero_OG = unpack_bits(packed_GB, self.field_bits, low, self.outputs).T.to(torch.int16)
        else:
            zero_OG = read(zero).to(torch.int16)
        return codes_OI - zero_OG.repeat_interleave(self.group, 1)[:, : self.inputs]

    def _fields(self, name: str, read: Tensors, count: int) -> Tensor:
        tensor = self.tensors[name]
        if tensor.dtype in (torch.int8, torch.float8_e4m3fn):
            return read(tensor).view(torch.int8).to(torch.int16)
        low = -(2 ** (self.field_bits - 1))
        if tensor.dtype == torch.uint8:  # ours, or two floats a byte
            low = self.scheme.weights.low if self.scheme else 0
        packed_OB = read(tensor).view(torch.uint8).reshape(self.outputs, -1)
        return unpack_bits(packed_OB, self.field_bits, low, count).to(torch.int16)


@dataclass(frozen=True)
class Stored:
    """A checkpoint sorted into codes and everything else."""

    folder: Path
    format: str
    """`plain`, or the `quant_method` of its config."""
    coded: tuple[CodedSite | BnbSite, ...]
    dense: tuple[TensorHeader, ...]


def stored(folder: Path) -> Stored:
    """Sort the tensors of a folder; reads no weight.

    Raises: CompressError when the files are damaged, or quantized in a format that is none of ours,
    compressed-tensors and bitsandbytes.
    """
    found = headers(folder)
    config = read_json(folder / "config.json").get("quantization_config") or {}
    method = str(config.get("quant_method", "plain"))
    if method == "plain":
        return Stored(folder, method, (), tuple(found.values()))
    if method not in _READERS:
        raise CompressError(
            "footprint.format",
            f"codes of the format {method!r} are not understood",
            where=f"{folder}/config.json",
            fix=f"use a folder in plain, {' or '.join(_READERS)} format",
        )
    coded: tuple[CodedSite | BnbSite, ...] = tuple(_READERS[method](config, found, _schemes(folder)))
    taken = {tensor.name for site in coded for tensor in site.tensors.values()}
    return Stored(folder, method, coded, tuple(tensor for name, tensor in found.items() if name not in taken))


def _from_manifest(
    config: Mapping[str, Any], found: Mapping[str, TensorHeader], _: Mapping[str, Scheme]
) -> Iterator[CodedSite]:
    for name, spec in _quantized_specs(config.get("modules", {})):
        scheme = named_scheme(str(spec["scheme"]))
        outputs, inputs = int(spec["outputs"]), int(spec["inputs"])
        group = scheme.weights.group or inputs
        yield CodedSite(name, outputs, inputs, scheme.weights.bits, group, scheme, _at(name, found))


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
        tensors = _at(name, found)
        if "weight_packed" in tensors and "weight_shape" not in tensors:
            outputs, packed = tensors["weight_packed"].shape
            inputs, bits = 2 * packed, 4
        elif "weight_packed" in tensors:
            outputs, inputs = read(tensors["weight_shape"]).tolist()
            words = tensors["weight_packed"].shape[1]
            bits = next(width for width in widths if -(-inputs * width // 32) == words)
        else:
            outputs, inputs = tensors["weight"].shape
            bits = 8 * tensors["weight"].dtype.itemsize
        groups = tensors["weight_scale"].shape[-1] if len(tensors["weight_scale"].shape) > 1 else 1
        yield CodedSite(name, outputs, inputs, bits, inputs // groups, schemes.get(name), tensors)


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
    "bitsandbytes": _from_bitsandbytes,
}


def _at(name: str, found: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """The tensors of a quantized linear, its bias left out."""
    leaves = {leaf: found.get(f"{name}.{leaf}") for leaf in sorted(_LABELS | {"weight"})}
    return {leaf: tensor for leaf, tensor in leaves.items() if tensor is not None}


def _schemes(folder: Path) -> dict[str, Scheme]:
    """The grids that our own report names: a 3-bit grid lies in 4-bit fields, and the files cannot say so."""
    if not (folder / REPORT).is_file():
        return {}
    rows = read_json(folder / REPORT).get("sites", [])
    return {row["site"]: named_scheme(row["scheme"]) for row in rows if row.get("scheme")}
