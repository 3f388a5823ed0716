"""The base class of benches: a runtime in which products are measured alone, and small models from end to end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from llmcompress.modules.expression import Expression, Tied
from llmcompress.modules.expression_leaves import Dense, Quantized
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.scheme import named_scheme
from llmcompress.registry import Registry
from llmcompress.runners.base import RUNNERS, Runner
from llmcompress.search.costs.forms import DENSE, Matrix


@dataclass(frozen=True)
class Bench(ABC):
    """One runtime on one device."""

    device: torch.device
    dtype: torch.dtype
    """In which a runtime computes that asks for it."""

    head_sees_prompt: ClassVar[bool] = False
    """Whether a prefill computes logits of all tokens, and not of the last alone."""

    @abstractmethod
    def products(self, matrix: Matrix, copies: int, *, tied: bool = False) -> Callable[[int], Callable[[], None]]:
        """For a number of tokens: what computes that many products, each with weights of its own.

        `tied`: the matrix is an embedding that the head shares.

        Raises: Unmeasurable where the runtime has no such product.
        """

    @abstractmethod
    def held_bytes(self, matrix: Matrix) -> int:
        """That the runtime keeps of such a matrix in memory."""

    def transient_bytes(self, matrix: Matrix) -> int:
        """That a product takes besides, for as long as it computes."""
        return 0

    @abstractmethod
    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """A small model into an empty folder, so that the runner of the runtime opens it."""

    def open(self, model: PreTrainedModel, folder: Path) -> Runner:
        """The small model as the runtime runs it; the folder is empty."""
        self.save(model, folder)
        return RUNNERS[BENCHES.name_of(type(self))].open(str(folder), device=self.device, dtype=self.dtype)

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Of the packages that compute."""


class Unmeasurable(Exception):
    """Why a runtime computes no such product."""


BENCHES: Registry[Bench] = Registry("bench", "llmcompress.search.costs.benches")


def random_linear(matrix: Matrix, dtype: torch.dtype, device: torch.device) -> QuantLinear | torch.nn.Linear:
    """With weights or codes of no meaning: how long a product takes does not depend on them."""
    if matrix.form == DENSE:
        linear = torch.nn.utils.skip_init(  # type: ignore[no-untyped-call]
            torch.nn.Linear, matrix.inputs, matrix.outputs, bias=False, dtype=dtype, device=device
        )
        assert isinstance(linear, torch.nn.Linear)
        linear.weight.requires_grad_(False).uniform_(-1, 1)
        return linear
    made, grid = empty_codes(matrix, dtype).to(device), named_scheme(matrix.form).weights
    codes_OI = torch.randint(grid.low, grid.high + 1, made.codes_OI.shape, dtype=torch.int8, device=device)
    made.codes_OI.copy_(codes_OI)
    return made.eval()


def empty_codes(matrix: Matrix, dtype: torch.dtype) -> QuantLinear:
    """On the default device."""
    spec = {"scheme": matrix.form, "outputs": matrix.outputs, "inputs": matrix.inputs, "bias": False}
    return QuantLinear.from_spec(spec, dtype)


def random_expression(matrix: Matrix, owner: str, *, tied: bool) -> Expression:
    """The same as exporters read it."""
    linear = random_linear(matrix, torch.float32, torch.device("cpu"))
    form: Quantized | Dense = linear.leaf() if isinstance(linear, QuantLinear) else Dense(linear.weight)
    return Tied(owner, form) if tied else form
