"""Reads OpenVINO's IR without OpenVINO: the XML graph, and the constants in the file beside it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch import Tensor

from llmcompress.formats.openvino import Constant, Packed, values

_MODULE = re.compile(r"__module\.(?:model\.)?(?P<module>.+)/aten::")
_WEIGHT_PORT = {"MatMul": 1, "Gather": 0}


@dataclass(frozen=True)
class Layer:
    """One node."""

    name: str
    type: str
    data: Mapping[str, str] = field(default_factory=dict)
    """Its attributes."""


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """What a named node of the graph computes from constants alone."""

    weight: Tensor
    """Float32, as the IR defines it."""
    type: str
    """Of the codes, or of the ordinary weights."""
    packed: Packed | None
    """None of ordinary weights."""
    readers: tuple[str, ...]
    """Types of the nodes that multiply by it or look up its rows."""


class IrFile:
    """An `.xml` file and its `.bin`, which is read where it is looked at."""

    def __init__(self, path: Path) -> None:
        root = ElementTree.parse(path).getroot()
        self.layers = {
            each.attrib["id"]: Layer(each.attrib["name"], each.attrib["type"], _attributes(each))
            for each in root.iterfind("layers/layer")
        }
        self._sources: dict[str, list[tuple[int, str]]] = defaultdict(list)
        self._readers: dict[str, list[tuple[str, int]]] = defaultdict(list)
        ports = {
            (layer.attrib["id"], port.attrib["id"]): number
            for layer in root.iterfind("layers/layer")
            for number, port in enumerate(layer.iterfind("input/port"))
        }
        for edge in root.iterfind("edges/edge"):
            start, end = edge.attrib["from-layer"], edge.attrib["to-layer"]
            port = ports[end, edge.attrib["to-port"]]
            self._sources[end].append((port, start))
            self._readers[start].append((end, port))
        weights = path.with_suffix(".bin")
        size = weights.stat().st_size
        self._bytes = torch.from_file(str(weights), shared=False, size=size, dtype=torch.uint8) if size else None

    @cached_property
    def names(self) -> dict[str, str]:
        """Name of a node → its number."""
        return {layer.name: number for number, layer in self.layers.items()}

    def matrix(self, name: str) -> StoredMatrix | None:
        """The matrix of that name; None where the graph has none."""
        number = self.names.get(name)
        if number is None:
            return None
        readers = (
            self.layers[end].type
            for end, port in self._readers[number]
            if _WEIGHT_PORT.get(self.layers[end].type) == port
        )
        found = {key: self._constant(self.names[f"{name}/{key}"]) for key in _PARTS if f"{name}/{key}" in self.names}
        weight = self._computed(number)
        if "codes" in found:
            packed = Packed(found["codes"], found["scale"], found.get("zero_point"))
            return StoredMatrix(weight, packed.codes.type, packed, tuple(readers))
        stored = found["stored"] if "stored" in found else self._constant(number)
        return StoredMatrix(weight, stored.type, None, tuple(readers))

    def vectors(self, module: str) -> Iterator[Tensor]:
        """Float constants that nodes of a module read beside its matrix."""
        for number in self._nodes_of.get(module, ()):
            for _, source in self._sources[number]:
                layer = self.layers[source]
                if layer.type == "Const" and layer.data.get("element_type") in ("f32", "f16", "bf16"):
                    yield values(self._constant(source)).flatten()

    @cached_property
    def _nodes_of(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for number, layer in self.layers.items():
            named = _MODULE.match(layer.name)
            if named is not None:
                found[named["module"]].append(number)
                found[f"model.{named['module']}"].append(number)  # the name may begin like that itself
        return found

    def _constant(self, number: str) -> Constant:
        layer = self.layers[number]
        assert layer.type == "Const" and self._bytes is not None, f"{layer.name} is no constant"
        start, size = int(layer.data["offset"]), int(layer.data["size"])
        shape = tuple(int(each) for each in layer.data["shape"].split(",") if each.strip())
        # a copy: constants stand where the one before ends, at odd places too
        return Constant(layer.data["element_type"], shape, self._bytes[start : start + size].clone())

    def _computed(self, number: str) -> Tensor:
        """Decompression, as the IR defines its operations, in float32."""
        layer = self.layers[number]
        if layer.type == "Const":
            return values(self._constant(number))
        first, *rest = (source for _, source in sorted(self._sources[number]))
        value = self._computed(first)
        if layer.type == "Convert":
            assert layer.data["destination_type"] == "f32", f"{layer.name} converts to {layer.data['destination_type']}"
            return value
        if layer.type == "Reshape":
            return value.reshape([int(each) for each in self._int64(rest[0])])
        operand = self._computed(rest[0])
        assert layer.type in ("Subtract", "Multiply"), f"{layer.name} is a {layer.type}"
        return value - operand if layer.type == "Subtract" else value * operand

    def _int64(self, number: str) -> list[int]:
        found: list[int] = self._constant(number).data.view(torch.int64).tolist()
        return found


_PARTS = ("codes", "scale", "zero_point", "stored")


def _attributes(layer: ElementTree.Element) -> dict[str, str]:
    data = layer.find("data")
    return {} if data is None else dict(data.attrib)
