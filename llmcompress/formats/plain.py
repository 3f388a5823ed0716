"""The tensors of an ordinary linear: `weight`, and `bias` if there is one. O = outputs, I = inputs."""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from llmcompress.formats.named import Kind, Named, empty_dense, kinds
from llmcompress.modules.expression_leaves import Dense


class Matrix(Protocol):
    """An expression, or a module that is one."""

    def dense_weight(self) -> Tensor:
        """O×I.

        Raises: TypeError when it stands for no single matrix.
        """

    def dense_bias(self) -> Tensor | None:
        """What is added."""


def pack(form: Matrix, dtype: torch.dtype, *, transposed: bool = False) -> dict[str, Tensor]:
    """Multiplied out and rounded to `dtype`; a Conv1D stores inputs × outputs.

    Raises: TypeError when the expression stands for no single matrix.
    """
    weight_OI = form.dense_weight().detach().to(dtype)
    bias_O = form.dense_bias()
    tensors = {"weight": weight_OI.T if transposed else weight_OI}
    return tensors if bias_O is None else {**tensors, "bias": bias_O.detach().to(dtype)}


def unpack(tensors: Named, *, transposed: bool = False) -> Dense:
    """The linear that these tensors are."""
    weight = tensors["weight"]
    return Dense(weight.T if transposed else weight, bias=tensors.get("bias"))


@cache
def tensors(shape: tuple[int, int], dtype: torch.dtype, *, bias: bool, transposed: bool = False) -> dict[str, Kind]:
    """Names, dtypes and shapes of what `pack` gives for a linear of that shape (O, I)."""
    return kinds(pack(empty_dense(shape, dtype, bias=bias), dtype, transposed=transposed))
