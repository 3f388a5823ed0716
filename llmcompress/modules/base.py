"""Base classes of compressed modules, which are saved and rebuilt as plain data. O = outputs, I = inputs."""

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
    """Replaces a linear (or an embedding, a block); computes exactly what the saved model computes.

    Subclasses register under the name used in manifests: `@MODULES.register("low_rank")`. All learned values are in
    parameters and persistent buffers; everything else is in `spec`.

    The empty buffer `weight` is a guard: a loader without our plug-in builds the stock module, whose `weight` has
    another shape, and refuses the file. For *missing* tensors it would only warn, and fill them with random numbers.
    """

    has_stock_format: ClassVar[bool] = False
    """Whether stock loaders can represent it if it has the sizes and the bias of the stock module."""
    holds_codes: ClassVar[bool] = False
    """Whether its own buffers (without its parts) are codes and scales."""
    is_transparent: ClassVar[bool] = False
    """Whether its parts have the names of the stock checkpoint, where they are stored individually."""
    wraps_original: ClassVar[bool] = False
    """Whether it contains the original module unchanged."""

    out_features: int
    in_features: int
    weight: Tensor

    frame: ClassVar[bool] = False
    """Whether training uses its parts and does not change what it adds: thresholds, indices."""

    def __init__(self) -> None:
        super().__init__()
        self._guard()

    def _guard(self) -> None:
        self.register_buffer("weight", torch.empty(0))

    @abstractmethod
    def spec(self) -> Spec:
        """JSON data from which, with the state dict, `from_spec` rebuilds this module."""

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        """A module of the right shapes, ready for `load_state_dict`; may run under the meta device."""

    def take(self, replaced: nn.Module) -> None:
        """Take what is needed from the replaced module; by default nothing."""

    def connect(self, model: nn.Module) -> None:
        """Connect to other modules once all are in place; by default nothing."""

    @abstractmethod
    def expression(self) -> Expression:
        """What it computes, with its own tensors; `Opaque` where the algebra cannot represent it."""

    def dense_weight(self) -> Tensor:
        """The one matrix that it stands for, O×I (an embedding: entries × width), in its parameters' dtype.

        Raises: TypeError when there is none.
        """
        return self.expression().dense_weight()

    def dense_bias(self) -> Tensor | None:
        """The bias that belongs to `dense_weight`; for factors with a bias each, both combined."""
        return self.expression().dense_bias()

    def coded_weights(self) -> int:
        """Number of quantized weights in its own buffers, without its parts."""
        return 0

    def coded_bits(self) -> int:
        """Bits of codes without padding, scales and zero points."""
        return 0

    def differs_below(self, stock: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        """Parts that may differ from stock: name, part, and its stock counterpart."""
        yield from ()

    def is_dense(self) -> bool:
        """Whether it is stored under the stock names as if nothing had been replaced."""
        return False

    @classmethod
    def cache_bytes_per_token(cls, spec: Spec) -> int:
        """Bytes per token of its quantized KV cache, from its spec."""
        return 0

    def requantized(self, weight_OI: Tensor, storage_dtype: torch.dtype) -> CompressedModule:
        """A module of the same kind and scheme, with codes of another weight and the same bias.

        Raises: CompressError when this kind does not hold the codes of one matrix.
        """
        raise CompressError(
            "training.requantize",
            f"a {MODULES.name_of(type(self))} cannot be rounded again: it does not hold the codes of one matrix",
            fix="leave adapters apart: remove `merge: requantize`",
        )

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
    """Replaces a compressed module while its values are trained, and computes what the compressed module will compute.

    Before the first step that is the module's own output, bit for bit. It is in no manifest and is never saved:
    `compressed` converts it back. Subclasses list in `roles` which of their parameters are trained.
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
        """The compressed module that computes what the last forward pass did; untrained: the original."""

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The current dense matrix, with its graph."""

    @property
    def weight(self) -> Tensor:
        """Some model code reads `linear.weight.dtype` or its device."""
        return self.dense_weight()

    def begin_at(self, weight_OI: Tensor) -> None:
        """Begin at this weight instead, as far as that changes nothing that is computed; by default nothing is done."""

    def trained(self) -> list[tuple[Role, nn.Parameter]]:
        """All trained parameters, those of nested twins included."""
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
