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
from llmcompress.runners.base import Runner
from llmcompress.search.costs.forms import DENSE, Matrix


@dataclass(frozen=True)
class Bench(ABC):
    """One runtime on one device."""

    device: torch.device
    dtype: torch.dtype
    """In which a runtime computes that asks for it."""

    head_sees_prompt: ClassVar[bool] = False
    """Whether a prefill computes logits of all tokens, and not of the last alone."""
    measures_products: ClassVar[bool] = True
    """Whether `products` is there; otherwise products are differences of small models."""

    @abstractmethod
    def products(self, matrix: Matrix, copies: int, *, tied: bool = False) -> Callable[[int], Callable[[], None]]:
        """For a number of tokens: what computes that many products, each with weights of its own.

        `tied`: the matrix is an embedding that the head shares.

        Raises: Unmeasurable where the runtime has no such product.
        """

    @abstractmethod
    def open(self, model: PreTrainedModel, folder: Path) -> Runner:
        """A small model as the runtime runs it; what it needs on disk goes into the folder, which is empty."""

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
    scheme = named_scheme(matrix.form)
    spec = {"scheme": scheme.name, "outputs": matrix.outputs, "inputs": matrix.inputs, "bias": False}
    made = QuantLinear.from_spec(spec, dtype).to(device)
    made.codes_OI.copy_(
        torch.randint(scheme.weights.low, scheme.weights.high + 1, made.codes_OI.shape, dtype=torch.int8, device=device)
    )
    return made.eval()


def random_expression(matrix: Matrix, owner: str, *, tied: bool) -> Expression:
    """The same as exporters read it."""
    linear = random_linear(matrix, torch.float32, torch.device("cpu"))
    form: Quantized | Dense = linear.leaf() if isinstance(linear, QuantLinear) else Dense(linear.weight)
    return Tied(owner, form) if tied else form
