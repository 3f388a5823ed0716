"""What replaces a module after compression, and is built again from plain data. O = outputs, I = inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from llmcompress.errors import CompressError
from llmcompress.modules.expression import Expression
from llmcompress.modules.trainable_roles import Role, TrainableRoles
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

    frame: ClassVar[bool] = False
    """Whether training looks inside it and leaves alone what it adds: thresholds, indices, places."""

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

    def trainable(self, wanted: TrainableRoles) -> TrainableTwin:
        """What stands here during a training, with parameters that begin at what this module computes with.

        Raises: CompressError when this kind has no such form.
        """
        raise CompressError(
            "training.no-trainable-form",
            f"a {MODULES.name_of(type(self))} has no trainable form",
            fix="train adapters instead, or exclude these sites",
        )


class TrainableTwin(nn.Module, ABC):
    """Stands where a compressed module stood while its numbers are trained, and computes what that will compute.

    Before the first step that is the module's own output to the bit. It is in no manifest and is never saved:
    `settled` ends it. Subclasses note in `roles` which parameters of their own are trained.
    """

    out_features: int
    in_features: int

    def __init__(self, module: CompressedModule) -> None:
        super().__init__()
        self.out_features, self.in_features = module.out_features, module.in_features
        self.roles: dict[str, Role] = {}
        self.train(module.training)

    @abstractmethod
    def compressed(self) -> CompressedModule:
        """The compressed module that computes exactly what the last forward did; untrained: the first one's bits."""

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The matrix that it stands for now, with its graph."""

    @property
    def weight(self) -> Tensor:
        """Some model code reads `linear.weight.dtype` or its device."""
        return self.dense_weight()

    def trained(self) -> list[tuple[Role, nn.Parameter]]:
        """Every parameter that is to be trained, those of twins inside included."""
        twins = [each for each in self.modules() if isinstance(each, TrainableTwin)]
        return [(role, twin.get_parameter(name)) for twin in twins for name, role in twin.roles.items()]


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
