"""Linears, embeddings and output heads as tensor trains. O = outputs, I = inputs, V = entries, D = width, R = bonds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from string import ascii_letters
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from llmcompress.modules.base import MODULES, CompressedModule, Spec, TrainableTwin
from llmcompress.modules.expression import Expression, Gather
from llmcompress.modules.expression_leaves import Contraction
from llmcompress.modules.trainable import TwinOfParts
from llmcompress.modules.trainable_roles import TrainableRoles
from llmcompress.numerics.tensor_train import compose, tensor_to_matrix


@MODULES.register("tensor_train")
class TensorTrainLinear(CompressedModule):
    """A matrix as a chain of cores R×M×N×R, one for each pair of an output axis M and an input axis N."""

    def __init__(self, cores: Sequence[Tensor], bias_O: Tensor | None) -> None:
        super().__init__()
        self.outputs = tuple(core.shape[1] for core in cores)
        self.inputs = tuple(core.shape[2] for core in cores)
        self.ranks = tuple(core.shape[3] for core in cores[:-1])
        self.out_features, self.in_features = math.prod(self.outputs), math.prod(self.inputs)
        self.cores = _parameters(cores)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)

    @override
    def spec(self) -> Spec:
        axes = {"outputs": list(self.outputs), "inputs": list(self.inputs), "ranks": list(self.ranks)}
        return {**axes, "bias": self.bias is not None}

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        bonds = (1, *spec["ranks"], 1)
        shapes = zip(bonds[:-1], spec["outputs"], spec["inputs"], bonds[1:], strict=True)
        bias_O = torch.zeros(math.prod(spec["outputs"]), dtype=dtype) if spec["bias"] else None
        return cls([torch.zeros(shape, dtype=dtype) for shape in shapes], bias_O)

    @override
    def expression(self) -> Expression:
        """The outputs' axes in order, then the inputs'; bonds between neighbours are summed over."""
        count, letters = len(self.cores), iter(ascii_letters)
        outputs, inputs, bonds = (list(islice(letters, count + more)) for more in (0, 0, 1))
        cores = ["".join(four) for four in zip(bonds[:-1], outputs, inputs, bonds[1:], strict=True)]
        equation = f"{','.join(cores)}->{''.join(outputs + inputs)}"
        return Contraction(equation, tuple(self.cores), (self.out_features, self.in_features), bias=self.bias)

    @override
    def dense_weight(self) -> Tensor:
        """As the expression, by products of matrices."""
        chain = [core.flatten(1, 2)[None] for core in self.cores]
        return tensor_to_matrix(compose(chain)[0], self.outputs, self.inputs)

    @override
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.numel() // self.in_features
        if self._steps() * tokens < self._composing() + self.out_features * self.in_features * tokens:
            out = self._contracted(x.reshape(tokens, self.in_features)).reshape(*x.shape[:-1], self.out_features)
            return out if self.bias is None else out + self.bias
        return functional.linear(x, self.dense_weight(), self.bias)

    def _contracted(self, x_TI: Tensor) -> Tensor:
        """The product, one core at a time: the matrix is never made."""
        tokens, done, left = len(x_TI), 1, self.in_features
        for core in self.cores:
            before, outputs, inputs, _ = core.shape
            left //= inputs
            state = x_TI.reshape(tokens, done, before, inputs, left)
            x_TI = torch.einsum("tdrnl,rmns->tdmsl", state, core)
            done *= outputs
        return x_TI.reshape(tokens, self.out_features)

    def _steps(self) -> int:
        """Multiplications per token, core by core."""
        total, done, left = 0, 1, self.in_features
        for outputs, inputs, before, after in self._shapes():
            total += done * left * before * outputs * after
            done, left = done * outputs, left // inputs
        return total

    def _composing(self) -> int:
        """Multiplications to make the matrix."""
        total, size = 0, 1
        for outputs, inputs, before, after in self._shapes():
            size *= outputs * inputs
            total += size * before * after
        return total

    def _shapes(self) -> Iterator[tuple[int, int, int, int]]:
        return zip(self.outputs, self.inputs, (1, *self.ranks), (*self.ranks, 1), strict=True)

    @override
    def extra_repr(self) -> str:
        return f"{self.inputs} → {self.outputs}, ranks {self.ranks}"

    @override
    def trainable(self, wanted: TrainableRoles) -> TrainableTwin:
        return TwinOfParts(self, wanted.with_matrices_as("factors"))


class _Rows(CompressedModule):
    """V rows of width D, each its own tensor train: core k holds V×R×A×R."""

    def __init__(self, cores: Sequence[Tensor]) -> None:
        super().__init__()
        self.axes = tuple(core.shape[2] for core in cores)
        self.ranks = tuple(core.shape[3] for core in cores[:-1])
        self.out_features, self.in_features = cores[0].shape[0], math.prod(self.axes)
        self.cores = _parameters(cores)

    @override
    def spec(self) -> Spec:
        return {"entries": self.out_features, "axes": list(self.axes), "ranks": list(self.ranks)}

    def _rows(self, bias_V: Tensor | None) -> Contraction:
        """Every row's own train, and what is added to its product with an input."""
        count, letters = len(self.cores), iter(ascii_letters)
        row, axes, bonds = next(letters), list(islice(letters, count)), list(islice(letters, count + 1))
        cores = [f"{row}{left}{axis}{right}" for left, axis, right in zip(bonds[:-1], axes, bonds[1:], strict=True)]
        equation = f"{','.join(cores)}->{row}{''.join(axes)}"
        return Contraction(equation, tuple(self.cores), (self.out_features, self.in_features), bias=bias_V)

    @override
    def dense_weight(self) -> Tensor:
        """As the expression, by products of matrices."""
        return compose(list(self.cores))

    @override
    def extra_repr(self) -> str:
        return f"{self.out_features} × {self.axes}, ranks {self.ranks}"

    @override
    def trainable(self, wanted: TrainableRoles) -> TrainableTwin:
        return TwinOfParts(self, wanted.with_matrices_as("factors"))


@MODULES.register("tensor_train_embedding")
class TensorTrainEmbedding(_Rows):
    """An embedding that makes only the rows that are looked up; `scale` is what its class multiplies them by."""

    def __init__(self, cores: Sequence[Tensor], scale: float = 1.0) -> None:
        super().__init__(cores)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = self.out_features, self.in_features

    @override
    def spec(self) -> Spec:
        return {**super().spec(), "scale": self.scale}

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        return cls(_empty_cores(spec, dtype), float(spec["scale"]))

    @override
    def expression(self) -> Expression:
        return Gather(self._rows(None), self.scale)

    @override
    def forward(self, ids: Tensor) -> Tensor:
        rows = compose([core[ids.reshape(-1)] for core in self.cores])
        rows = rows if self.scale == 1.0 else rows * self.scale
        return rows.reshape(*ids.shape, self.embedding_dim)


@MODULES.register("tensor_train_head")
class TensorTrainHead(_Rows):
    """A head whose rows are tensor trains; all of them are made in every forward."""

    def __init__(self, cores: Sequence[Tensor], bias_O: Tensor | None) -> None:
        super().__init__(cores)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)

    @override
    def spec(self) -> Spec:
        return {**super().spec(), "bias": self.bias is not None}

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        return cls(_empty_cores(spec, dtype), torch.zeros(spec["entries"], dtype=dtype) if spec["bias"] else None)

    @override
    def expression(self) -> Expression:
        return self._rows(self.bias)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.dense_weight(), self.bias)


def _parameters(cores: Sequence[Tensor]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(core, requires_grad=False) for core in cores)


def _empty_cores(spec: Spec, dtype: torch.dtype) -> list[Tensor]:
    bonds = (1, *spec["ranks"], 1)
    shapes = zip(bonds[:-1], spec["axes"], bonds[1:], strict=True)
    return [torch.zeros(spec["entries"], left, axis, right, dtype=dtype) for left, axis, right in shapes]
