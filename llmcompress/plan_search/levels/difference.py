"""`Difference`: how a block, or one linear of it, differs from what stood there before; and how to make it so again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llmcompress.modules.manifest import Manifest, apply_manifest, changes

_SITE = "site"
"""What a linear is called in a difference of its own."""

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Difference:
    """Modules that were replaced, shapes and numbers that changed, and the tensors that are new or have new values."""

    manifest: Manifest = field(default_factory=Manifest)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, live: nn.Module, before: nn.Module) -> Difference:
        """What must be done to `before` to get `live`; tensors are those of `live`, not copies."""
        known = before.state_dict()
        manifest = changes(live, before)
        whole = tuple(f"{name}." for name in manifest.modules)
        tensors = {
            name: tensor
            for name, tensor in live.state_dict().items()
            if name.startswith(whole) or name not in known or not _equal(tensor, known[name])
        }
        return cls(manifest, tensors)

    def __bool__(self) -> bool:
        return bool(self.manifest or self.tensors)

    def of_site(self, site: str) -> Difference:
        """What concerns one linear, for `module`."""
        manifest = self.manifest
        return Difference(
            Manifest(_below(manifest.modules, site), _below(manifest.shapes, site), _below(manifest.attributes, site)),
            _below(self.tensors, site),
        )

    def outside(self, sites: Iterable[str]) -> list[str]:
        """Names of tensors that changed and belong to none of these linears."""
        inside = tuple(f"{site}." for site in sites)
        return [name for name in self.tensors if not name.startswith(inside)]

    def put(self, module: nn.Module) -> None:
        """Make the module, which is like the one before, like the one after; in place, tensors are copied."""
        dtype = next(module.parameters()).dtype
        apply_manifest(module, self.manifest, dtype)
        for name, tensor in self.tensors.items():
            # replaced as a whole: the module may share its old tensors with another one
            owner, _, leaf = name.rpartition(".")
            part = module.get_submodule(owner)
            old = getattr(part, leaf)
            new = tensor.to(device=old.device, dtype=old.dtype, copy=True)
            if leaf in part._parameters:
                part._parameters[leaf] = nn.Parameter(new, requires_grad=False)
            else:
                part._buffers[leaf] = new

    def module(self, dense: nn.Module) -> nn.Module:
        """What stands at the site instead of `dense`, of which unchanged tensors are shared; for `of_site`."""
        holder = nn.Module()
        holder.add_module(_SITE, sharing(dense))
        holder.train(dense.training)
        self.put(holder)
        return holder.get_submodule(_SITE)


def sharing(module: M) -> M:
    """A copy of a module's structure whose tensors are the same ones."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, memo)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


T = TypeVar("T")


def _below(named: Mapping[str, T], site: str) -> dict[str, T]:
    return {
        f"{_SITE}{name.removeprefix(site)}": value
        for name, value in named.items()
        if name == site or name.startswith(f"{site}.")
    }
