"""The manifest: how a compressed model differs from the stock model of its config, as plain data; and how to apply it.

Passes do not record anything: the differences are found by comparing modules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import nn

from llmcompress.errors import CompressError
from llmcompress.modules.base import MODULES, CompressedModule, Spec, from_named_spec, named_spec
from llmcompress.modules.plain_attributes import plain_numbers
from llmcompress.modules.private_config import PrivateConfig

_CONFIG = "config."
"""Prefix of attributes that a module reads through a config of its own."""


@dataclass(frozen=True)
class Manifest:
    """All names are full module or parameter names; modules inside a wrapper are under `<name>.inner`."""

    modules: dict[str, Spec] = field(default_factory=dict)
    """Replaced modules, in the order in which they must be put in place."""
    shapes: dict[str, list[int]] = field(default_factory=dict)
    """Parameters of ordinary modules that have another shape, or exist only here."""
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Numbers that ordinary modules were built with, where they differ."""
    reshaped: set[str] = field(default_factory=set)
    """Replaced linears with other sizes than the stock model's, or with a bias where it has none; found by `changes`,
    not part of the JSON."""

    def __bool__(self) -> bool:
        return bool(self.modules or self.shapes or self.attributes)

    @property
    def needs_plugin(self) -> bool:
        """Whether it contains more than modules of stock size that a stock format can represent."""
        return bool(self.shapes or self.attributes or self.reshaped) or not all(
            MODULES[spec["type"]].has_stock_format for spec in self.modules.values()
        )

    def to_json(self) -> dict[str, Any]:
        """JSON data."""
        return {"modules": self.modules, "shapes": self.shapes, "attributes": self.attributes}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What `to_json` gave."""
        return cls(data.get("modules", {}), data.get("shapes", {}), data.get("attributes", {}))


def changes(live: nn.Module, skeleton: nn.Module) -> Manifest:
    """How `live` differs from `skeleton` (any device, no weights are compared).

    Raises: CompressError for a module of a kind that no manifest can describe.
    """
    found = Manifest()
    _compare(live, skeleton, "", found)
    return found


def _compare(live: nn.Module, stock: nn.Module, name: str, found: Manifest) -> None:
    if isinstance(live, CompressedModule) and not (live.is_transparent and type(live) is type(stock)):
        found.modules[name] = named_spec(live)
        if live.has_stock_format and not live.is_transparent and _is_reshaped(live, stock):
            found.reshaped.add(name)
        for leaf, part, original in live.differs_below(stock):
            _compare(part, original, _join(name, leaf), found)
        return
    if type(live) is not type(stock):
        raise CompressError(
            "manifest.unknown-module",
            f"a {type(stock).__name__} was replaced by a {type(live).__name__}, which cannot be saved",
            where=name,
            fix="replace modules only with registered CompressedModules",
        )
    for leaf, parameter in live.named_parameters(recurse=False):
        before = stock._parameters.get(leaf)
        if before is None or before.shape != parameter.shape:
            found.shapes[_join(name, leaf)] = list(parameter.shape)
    differing = _attributes(live, stock)
    if differing:
        found.attributes[name] = differing
    lost = [leaf for leaf, child in stock.named_children() if live._modules.get(leaf) is None]
    if lost:
        raise CompressError(
            "manifest.unknown-module",
            "a module of the stock model is missing",
            where=_join(name, lost[0]),
            fix="replace modules only with registered CompressedModules",
        )
    for leaf, child in live.named_children():
        there = stock._modules.get(leaf)
        if there is None:
            raise CompressError(
                "manifest.unknown-module",
                f"the stock model has no such {type(child).__name__}",
                where=_join(name, leaf),
                fix="replace modules only with registered CompressedModules",
            )
        _compare(child, there, _join(name, leaf), found)


def _is_reshaped(live: CompressedModule, stock: nn.Module) -> bool:
    same_bias = (live.dense_bias() is None) == (getattr(stock, "bias", None) is None)
    return not same_bias or sorted(_sizes(stock)) != sorted((live.out_features, live.in_features))


def _sizes(stock: nn.Module) -> tuple[int, ...]:
    """Of a linear's weight, or of what already replaces it."""
    if isinstance(stock, CompressedModule):
        return (stock.out_features, stock.in_features)
    weight = stock._parameters.get("weight")
    return () if weight is None else tuple(weight.shape)


def _attributes(live: nn.Module, stock: nn.Module) -> dict[str, Any]:
    """Plain numbers (and tuples of them) that differ, those of a private config included."""
    differing = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in plain_numbers(live).items()
        if vars(stock).get(key) != value
    }
    mine, theirs = getattr(live, "config", None), getattr(stock, "config", None)
    if mine is not None and theirs is not None and hasattr(mine, "__dict__"):
        differing |= {
            _CONFIG + key: value
            for key, value in vars(mine).items()
            if isinstance(value, int | float) and not key.startswith("_") and getattr(theirs, key, None) != value
        }
    return differing


def apply_manifest(skeleton: nn.Module, manifest: Manifest, dtype: torch.dtype) -> None:
    """Make the stock model what `changes` described, with empty tensors on the skeleton's device, in place.

    Raises: CompressError when it names something that the skeleton does not have.
    """
    device = next(skeleton.parameters()).device
    with torch.device(device):
        for name, spec in manifest.modules.items():
            parent_name, _, leaf = name.rpartition(".")
            parent = _module(skeleton, parent_name)
            new = from_named_spec(spec, dtype)
            new.take(_module(skeleton, name))
            setattr(parent, leaf, new.train(parent.training))
        for name, shape in manifest.shapes.items():
            owner, _, leaf = name.rpartition(".")
            value = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            _module(skeleton, owner)._parameters[leaf] = value
    for name, values in manifest.attributes.items():
        module = _module(skeleton, name)
        for key, value in values.items():
            if key.startswith(_CONFIG):
                if not isinstance(module.config, PrivateConfig):
                    module.config = PrivateConfig(module.config)  # type: ignore[assignment]
                setattr(module.config, key.removeprefix(_CONFIG), value)
            else:
                setattr(module, key, tuple(value) if isinstance(value, list) else value)
    for part in skeleton.modules():
        if isinstance(part, CompressedModule):
            part.connect(skeleton)


def _module(root: nn.Module, name: str) -> nn.Module:
    try:
        return root.get_submodule(name)
    except AttributeError:
        raise CompressError(
            "manifest.no-such-module",
            "the manifest names a module that this version of transformers does not have",
            where=name,
            fix="load it with the version of transformers in its llmcompress_report.json",
        ) from None


def _join(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf
