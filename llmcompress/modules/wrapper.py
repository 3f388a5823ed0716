"""A module that adds something to a stock module and keeps that module, whole, inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.modules.base import CompressedModule


class Wrapper(CompressedModule):
    """Stands around `inner`, the module that stood there before; `spec` describes only what is added.

    Manifests record the wrapper and, separately, how `inner` differs from stock, under `<name>.inner`. Built by
    `from_spec` it is empty until `take` gives it the module. It answers for the attributes of `inner`: model code reads
    such things as `layer.attention_type` from outside.
    """

    inner: nn.Module

    def take(self, inner: nn.Module) -> None:
        """Put the module inside, and an empty tensor under the old name of one of its parameters.

        All names below `inner` are new ones, and of missing tensors a loader without our plug-in only warns.
        """
        stock = inner
        while isinstance(stock, Wrapper):
            stock = stock.inner
        names = (name for name, _ in stock.named_parameters())
        path = min(names, key=lambda name: (name.count("."), name)).split(".")
        owner: nn.Module = self
        for part in path[:-1]:
            owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(path[-1], torch.empty(0))
        self.inner = inner  # last: from here on the wrapper seems to have that parameter already

    def connect(self, model: nn.Module) -> None:
        """Find what it needs of the rest of the model, once all modules stand; most need nothing."""

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
    def dense_weight(self) -> Tensor:
        raise TypeError(f"a {type(self).__name__} stands for no single matrix")
