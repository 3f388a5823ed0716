"""Experts in a GGUF file: of every block one tensor each for all gates, ups and downs.

E = experts, O = outputs, I = inputs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmcompress.exporters.contents import Contents
from llmcompress.modules.base import CompressedModule
from llmcompress.modules.expression_leaves import Quantized
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.quantized import QuantizedTensor

_BANK = re.compile(r"(.+\.experts)\.")
_KINDS = ("gate", "up", "down")
_PARTS = {
    **{"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    **{"w1": "gate", "w3": "up", "w2": "down"},
}
"""Names of an expert's linears, of Mixtral too."""


@dataclass(frozen=True)
class Stack:
    """The same linear of all experts of a block."""

    kind: str
    """`gate`, `up` or `down`."""
    shape: tuple[int, int, int]
    """E, O, I."""
    experts: tuple[nn.Module, ...]
    """One each; or the module of the stock bank alone, whose parameters hold all of them."""

    @property
    def codes(self) -> QuantizedTensor | None:
        """Those of all experts, one below the other; None of ordinary weights."""
        tensors = [tensor for each in self.experts if (tensor := _codes(each)) is not None]
        if not tensors:
            return None
        return replace(
            tensors[0],
            codes=torch.cat([each.codes for each in tensors]),
            scale=torch.cat([each.scale for each in tensors]),
            zero_point=_stacked([each.zero_point for each in tensors]),
            shared_scale=_stacked([each.shared_scale for each in tensors]),
        )

    def dense(self) -> Tensor:
        """E·O×I, codes dequantized."""
        weights = [_dense(each, self.kind) for each in self.experts]
        return torch.cat(weights).detach()


def bank_of(name: str) -> str | None:
    """The module of experts that a tensor belongs to."""
    found = _BANK.match(name)
    return found[1] if found else None


def stacks_of(bank: nn.Module) -> list[Stack]:
    """Its gates, ups and downs; empty for a module that is laid out in another way."""
    if isinstance(bank, nn.ModuleList):
        members = [_members(expert) for expert in bank]
        if not members or any(set(each) != set(_KINDS) for each in members):
            return []
        return [_stack(kind, [each[kind] for each in members]) for kind in _KINDS]
    found = {name: tuple(value.shape) for name, value in bank.named_parameters(recurse=False)}
    if found.keys() != {"gate_up_proj", "down_proj"}:
        return []
    (experts, both, hidden), (_, _, inner) = found["gate_up_proj"], found["down_proj"]
    shapes = {"gate": (experts, inner, hidden), "up": (experts, inner, hidden), "down": (experts, hidden, inner)}
    return [Stack(kind, shape, (bank,)) for kind, shape in shapes.items()] if both == 2 * inner else []


def experts_problem(contents: Contents) -> str | None:
    """Why the experts of a block are no three tensors; None where they are, or there are none."""
    schemes = {site.name: site.scheme for site in contents.sites}
    found: dict[tuple[str, str], set[Scheme | None]] = {}
    for name in contents.linears:
        bank = bank_of(name)
        if bank is not None:
            found.setdefault((bank, name.rpartition(".")[2]), set()).add(schemes.get(name))
    mixed = next((f"{bank}.*.{leaf}" for (bank, leaf), kinds in found.items() if len(kinds) > 1), None)
    return mixed and f"the experts of a block are one tensor there, and those of {mixed} have different schemes"


def _members(expert: nn.Module) -> dict[str, nn.Module]:
    return {_PARTS[name]: part for name, part in expert.named_children() if name in _PARTS}


def _stack(kind: str, experts: Sequence[nn.Module]) -> Stack:
    outputs, inputs = _dense_shape(experts[0], kind)
    return Stack(kind, (len(experts), outputs, inputs), tuple(experts))


def _codes(expert: nn.Module) -> QuantizedTensor | None:
    form = expert.expression() if isinstance(expert, CompressedModule) else None
    return form.tensor if isinstance(form, Quantized) else None


def _dense(module: nn.Module, kind: str) -> Tensor:
    """O×I of one expert, E·O×I of a stock bank."""
    if isinstance(module, CompressedModule):
        return module.dense_weight()
    if isinstance(module, nn.Linear):
        return module.weight
    weight: Tensor = module.get_parameter("down_proj" if kind == "down" else "gate_up_proj")
    if kind != "down":
        weight = weight.chunk(2, 1)[0 if kind == "gate" else 1]
    return weight.reshape(-1, weight.shape[-1])


def _dense_shape(module: nn.Module, kind: str) -> tuple[int, int]:
    if isinstance(module, CompressedModule):
        return module.out_features, module.in_features
    outputs, inputs = _dense(module, kind).shape
    return outputs, inputs


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [each for each in parts if each is not None]
    return torch.cat(there) if there else None
