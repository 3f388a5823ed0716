"""Sizes and numbers of a whole model as two tables, to find where two models differ. Weights are never read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from llmcompress.model.block_experiment import LINEARS, sizes
from llmcompress.modules.plain_attributes import plain_attributes

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def replaced_modules(live: nn.Module, stock: nn.Module) -> frozenset[str]:
    """Full names of the outermost modules that are of another class than in the stock model."""
    found: set[str] = set()
    for name, module in stock.named_modules(remove_duplicate=False):
        if any(f"{name}.".startswith(f"{outer}.") for outer in found):
            continue
        if type(_at(live, name)) is not type(module):
            found.add(name)
    return frozenset(found)


@dataclass
class Facts:
    """Shapes of tensors by full name, and what modules note about themselves by module and attribute."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: dict[tuple[str, str], Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, replaced: frozenset[str]) -> Facts:
        """The facts of a model; a replaced linear counts by its outputs and inputs alone, what is in it by nothing."""
        facts = cls()
        for name, module in _outside(model, replaced):
            if name in replaced:
                size = _linear_size(module)
                if size is not None:
                    facts.shapes[name] = size
                continue
            kept = {key: b for key, b in module._buffers.items() if key not in module._non_persistent_buffers_set}
            for key, tensor in (*module._parameters.items(), *kept.items()):
                if tensor is not None:
                    facts.shapes[f"{name}.{key}"] = tuple(tensor.shape)
            for key, value in plain_attributes(module).items():
                facts.attributes[name, key] = value
        return facts

    def only_changed_from(self, other: Facts) -> Facts:
        """The same shapes, but only those attributes that differ: others may be stale and unused."""
        changed = {k: v for k, v in self.attributes.items() if k in other.attributes and other.attributes[k] != v}
        return Facts(self.shapes, changed)

    def differences(self, other: Facts) -> list[tuple[Any, Any]]:
        """Pairs of what stands here and there: sizes axis by axis, and attributes that this side has."""
        pairs: list[tuple[Any, Any]] = []
        for name in self.shapes.keys() | other.shapes.keys():
            mine, theirs = self.shapes.get(name), other.shapes.get(name)
            if mine is None or theirs is None or len(mine) != len(theirs):
                pairs.append((mine, theirs))
            else:
                pairs += [(a, b) for a, b in zip(mine, theirs, strict=True) if a != b]
        pairs += [(v, other.attributes.get(k)) for k, v in self.attributes.items() if other.attributes.get(k) != v]
        return pairs

    def is_uniform_beside(self, stock: Facts) -> bool:
        """Whether tensors of one kind (equal but for the numbers in their names) all changed in the same way."""
        seen: dict[object, tuple[int, ...]] = {}
        for name, shape in self.shapes.items():
            kind = (_NUMBER.sub("#", name), stock.shapes.get(name))
            if seen.setdefault(kind, shape) != shape:
                return False
        return True


def _outside(model: nn.Module, replaced: frozenset[str]) -> Iterator[tuple[str, nn.Module]]:
    inside = tuple(f"{name}." for name in replaced)
    for name, module in model.named_modules(remove_duplicate=False):
        if not name.startswith(inside):
            yield name, module


def _linear_size(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, LINEARS):
        return sizes(module)
    noted = vars(module).get("out_features"), vars(module).get("in_features")
    return noted if isinstance(noted[0], int) and isinstance(noted[1], int) else None  # type: ignore[return-value]


def _at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
