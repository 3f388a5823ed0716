"""A module that wraps a stock module and keeps it intact inside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import override

from llmcompress.modules.base import CompressedModule


class Wrapper(CompressedModule):
    """Wraps `inner`, the original module; `spec` describes only what is added.

    Manifests record the wrapper and, separately, how `inner` differs from stock, under `<name>.inner`. Built by
    `from_spec` it is empty until `take` gives it the module. It forwards the attributes of `inner`, because model code
    reads attributes such as `layer.attention_type`.
    """

    wraps_original: ClassVar[bool] = True

    inner: nn.Module
    frame: ClassVar[bool] = True

    @override
    def take(self, replaced: nn.Module) -> None:
        """Put the module inside, and an empty tensor under the old name of one of its parameters.

        All names below `inner` are new ones, and of missing tensors a loader without our plug-in only warns.
        """
        stock = replaced
        while isinstance(stock, Wrapper):
            stock = stock.inner
        path = min(
            [*_weights(stock)] or [name for name, _ in stock.named_parameters()],
            key=lambda name: (name.count("."), name),
        ).split(".")
        owner: nn.Module = self
        for part in path[:-1]:
            owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(path[-1], torch.empty(0))
        self.inner = replaced  # last: from here on the wrapper seems to have that parameter already

    def _guard(self) -> None:
        """Not before `take`: it needs a name."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self.__dict__["_modules"].get("inner")
            if inner is None or name == "inner":
                raise
            return getattr(inner, name)

    @override
    def differs_below(self, stock: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        yield "inner", self.inner, stock


def _weights(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the weights of the stock module, of compressed ones too: the same before and after compression."""
    for name, child in module.named_children():
        if isinstance(child, CompressedModule) or "weight" in child._parameters:
            yield f"{prefix}{name}.weight"
        else:
            yield from _weights(child, f"{prefix}{name}.")
