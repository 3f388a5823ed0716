"""Describes what a module computes as a tree of a few kinds of nodes, which exporters, metrics and reports read.

O = outputs, I = inputs, R = rank, K = outputs that are computed, V = entries, D = width.

Leaves, which hold numbers, are in `expression_leaves.py`; here are the nodes that combine them. The algebra is closed:
a module that it cannot represent is `Opaque`, with the reason.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from llmcompress.modules.input_transforms import InputChange


@dataclass(frozen=True, eq=False)
class Expression(ABC):
    """A function of the last axis of its input. Its tensors are the module's own, not copies."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs; of an embedding, entries and width."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Compute what the module computes, up to the order of sums."""

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The one matrix that it stands for, O×I in the dtype of its tensors.

        Raises: TypeError when there is none (`Opaque`).
        """

    def dense_bias(self) -> Tensor | None:
        """What is added to the product with `dense_weight`."""
        return None

    @property
    def parts(self) -> tuple[Expression, ...]:
        """Its parts, in order of execution."""
        return ()

    @property
    def is_linear(self) -> bool:
        """Whether `dense_weight` and `dense_bias` describe it fully: activations are not quantized or dropped."""
        return all(part.is_linear for part in self.parts)

    def nodes(self) -> Iterator[Expression]:
        """Itself and everything below, parents first."""
        yield self
        for part in self.parts:
            yield from part.nodes()


@dataclass(frozen=True, eq=False)
class Chain(Expression):
    """A sequence: of two factors, the right one (R×I) comes first and the left one (O×R) last."""

    links: tuple[Expression, ...]

    @property
    @override
    def parts(self) -> tuple[Expression, ...]:
        return self.links

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.links[-1].shape[0], self.links[0].shape[1]

    @override
    def __call__(self, x: Tensor) -> Tensor:
        for link in self.links:
            x = link(x)
        return x

    @override
    def dense_weight(self) -> Tensor:
        """Summed in float32."""
        first, *rest = (link.dense_weight() for link in self.links)
        for weight in rest:
            first = (weight.float() @ first.float()).to(weight.dtype)
        return first

    @override
    def dense_bias(self) -> Tensor | None:
        total: Tensor | None = None
        for link in self.links:
            carried = None if total is None else functional.linear(total, link.dense_weight())
            total = _sum(carried, link.dense_bias())
        return total


@dataclass(frozen=True, eq=False)
class Sum(Expression):
    """A sum of parts with the same input; the first one determines the dtype."""

    terms: tuple[Expression, ...]

    @property
    @override
    def parts(self) -> tuple[Expression, ...]:
        return self.terms

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.terms[0].shape

    @override
    def __call__(self, x: Tensor) -> Tensor:
        first, *rest = self.terms
        total = first(x)
        for term in rest:
            total = total + term(x)
        return total

    @override
    def dense_weight(self) -> Tensor:
        """Summed in float32."""
        first, *rest = (term.dense_weight() for term in self.terms)
        total = first.float()
        for weight in rest:
            total = total + weight.float()
        return total.to(first.dtype)

    @override
    def dense_bias(self) -> Tensor | None:
        total: Tensor | None = None
        for term in self.terms:
            total = _sum(total, term.dense_bias())
        return total


@dataclass(frozen=True, eq=False)
class InputTransform(Expression):
    """A transform of the input, then the inner expression."""

    change: InputChange
    inner: Expression

    @property
    @override
    def parts(self) -> tuple[Expression, ...]:
        return (self.inner,)

    @property
    @override
    def is_linear(self) -> bool:
        return self.change.is_linear and self.inner.is_linear

    @property
    @override
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.inner.shape
        return outputs, self.change.reads(inputs)

    @override
    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(self.change(x))

    @override
    def dense_weight(self) -> Tensor:
        return self.change.taken_in(self.inner.dense_weight())

    @override
    def dense_bias(self) -> Tensor | None:
        return self.inner.dense_bias()


@dataclass(frozen=True, eq=False)
class OutputPlaces(Expression):
    """The K outputs of `inner` at the positions `index_K` of `outputs`; the others are zero."""

    inner: Expression
    index_K: Tensor
    outputs: int

    @property
    @override
    def parts(self) -> tuple[Expression, ...]:
        return (self.inner,)

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inner.shape[1]

    @override
    def __call__(self, x: Tensor) -> Tensor:
        kept = self.inner(x)
        return kept.new_zeros(*kept.shape[:-1], self.outputs).index_copy(-1, self.index_K, kept)

    @override
    def dense_weight(self) -> Tensor:
        weight_KI = self.inner.dense_weight()
        return weight_KI.new_zeros(self.shape).index_copy(0, self.index_K, weight_KI)

    @override
    def dense_bias(self) -> Tensor | None:
        bias_K = self.inner.dense_bias()
        return None if bias_K is None else bias_K.new_zeros(self.outputs).index_copy(0, self.index_K, bias_K)


@dataclass(frozen=True, eq=False)
class Gather(Expression):
    """An embedding: token ids look up rows of the V×D table, which are multiplied by one number."""

    table: Expression
    multiplier: float = 1.0

    @property
    @override
    def parts(self) -> tuple[Expression, ...]:
        return (self.table,)

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.table.shape

    @override
    def __call__(self, x: Tensor) -> Tensor:
        return self.table.dense_weight()[x] * self.multiplier

    @override
    def dense_weight(self) -> Tensor:
        """The table itself, without the multiplier, which the loader applies."""
        return self.table.dense_weight()


@dataclass(frozen=True, eq=False)
class Tied(Expression):
    """Computes with the numbers of the module called `owner`, which are counted and stored there."""

    owner: str
    inner: Expression

    @property
    @override
    def parts(self) -> tuple[Expression, ...]:
        return (self.inner,)

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @override
    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x)

    @override
    def dense_weight(self) -> Tensor:
        return self.inner.dense_weight()

    @override
    def dense_bias(self) -> Tensor | None:
        return self.inner.dense_bias()


@dataclass(frozen=True, eq=False)
class Opaque(Expression):
    """Not representable in this algebra; `reason` is a sentence for error messages of exporters."""

    reason: str

    @property
    @override
    def shape(self) -> tuple[int, int]:
        self._refuse()

    @property
    @override
    def is_linear(self) -> bool:
        return False

    @override
    def __call__(self, x: Tensor) -> Tensor:
        self._refuse()

    @override
    def dense_weight(self) -> Tensor:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TypeError(self.reason)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
