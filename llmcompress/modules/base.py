"""What replaces a module after compression, and is built again from plain data. O = outputs, I = inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from llmcompress.modules.expression import Expression
from llmcompress.registry import Registry

Spec = dict[str, Any]
"""JSON data."""


class CompressedModule(nn.Module, ABC):
    """Replaces a linear (or an embedding, a block); computes exactly what will be shipped.

    Subclasses register under the name that manifests use: `@MODULES.register("low_rank")`. All that is learned lies in
    parameters and persistent buffers; everything else is in `spec`.

    The empty buffer `weight` is a guard: a loader without our plug-in builds the stock module, whose `weight` has
    another shape, and refuses the file. It would only warn of *missing* tensors, and fill them with random numbers.
    """

    has_stock_format: ClassVar[bool] = False
    """Whether stock loaders have words for one with the sizes and the bias of the module that stood there."""
    holds_codes: ClassVar[bool] = False
    """Whether its own buffers (not its parts) are codes and scales on a grid."""
    is_transparent: ClassVar[bool] = False
    """Whether its parts have the names and places of the stock checkpoint: they are what is stored, one by one."""
    wraps_original: ClassVar[bool] = False
    """Whether the module that stood there is whole inside."""

    out_features: int
    in_features: int
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._guard()

    def _guard(self) -> None:
        self.register_buffer("weight", torch.empty(0))

    @abstractmethod
    def spec(self) -> Spec:
        """JSON data that, with the state dict, makes this module again (`from_spec`)."""

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        """A module of the right shapes, ready for `load_state_dict`; may run under the meta device."""

    def take(self, replaced: nn.Module) -> None:
        """Note what stood there before; most need nothing of it."""

    def connect(self, model: nn.Module) -> None:
        """Find what it needs of the rest of the model, once all modules stand; most need nothing."""

    @abstractmethod
    def expression(self) -> Expression:
        """What it computes, with its own tensors; `Opaque` where the algebra has no words for it."""

    def dense_weight(self) -> Tensor:
        """The one matrix that it stands for, O×I (an embedding: entries × width), in its parameters' dtype.

        Raises: TypeError when there is none.
        """
        return self.expression().dense_weight()

    def dense_bias(self) -> Tensor | None:
        """What is added to the product with `dense_weight`: of two factors with a bias each, both."""
        return self.expression().dense_bias()

    def coded_weights(self) -> int:
        """How many weights its own buffers stand for, those of its parts left out: no parameter counts them."""
        return 0

    def coded_bits(self) -> int:
        """What these take when nothing is wasted: codes at their own width, scales, zero points."""
        return 0

    def differs_below(self, stock: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        """Parts that may themselves differ from stock: their names, they, and what they are to be compared with."""
        yield from ()

    def is_dense(self) -> bool:
        """Whether a stock checkpoint holds all of it under the stock names, as if nothing had been replaced."""
        return False

    @classmethod
    def cache_bytes_per_token(cls, spec: Spec) -> int:
        """Of keys and values that one with that spec caches as codes."""
        return 0


MODULES: Registry[CompressedModule] = Registry("compressed module", "llmcompress.modules")


def named_spec(module: CompressedModule) -> Spec:
    """The spec with the name under which its class is registered."""
    return {"type": MODULES.name_of(type(module)), **module.spec()}


def from_named_spec(spec: Spec, dtype: torch.dtype) -> CompressedModule:
    """The module that `named_spec` described, empty.

    Raises: CompressError when no such type is known: the file is from a newer version.
    """
    rest = dict(spec)
    return MODULES[rest.pop("type")].from_spec(rest, dtype)
