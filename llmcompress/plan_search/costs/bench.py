"""The base class of benches: a runtime in which products are measured alone, and small models from end to end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typing_extensions import override

from llmcompress.exporters.base import EXPORTERS, Exporter, Writing
from llmcompress.exporters.contents import CodedLinear
from llmcompress.exporters.dense_tables import bytes_of
from llmcompress.modules.expression import Expression, Tied
from llmcompress.modules.expression_leaves import Dense, Quantized
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.scheme import named_scheme
from llmcompress.plan_search.costs.forms import DENSE, Matrix
from llmcompress.registry import Registry
from llmcompress.runners.base import RUNNERS, Runner


@dataclass(frozen=True)
class Bench(ABC):
    """One runtime on one device."""

    device: torch.device
    dtype: torch.dtype
    """In which a runtime computes that asks for it."""

    head_sees_prompt: ClassVar[bool] = False
    """Whether a prefill computes logits of all tokens, and not of the last alone."""

    measures_products: ClassVar[bool] = True
    """Whether there is `products`; otherwise what a product takes is a difference of small models."""

    def products(self, matrix: Matrix, copies: int, *, tied: bool = False) -> Callable[[int], Callable[[], None]]:
        """For a number of tokens: what computes that many products, each with weights of its own.

        `tied`: the matrix is an embedding that the head shares.

        Raises: Unmeasurable where the runtime has no such product.
        """
        raise Unmeasurable(f"{type(self).__name__} measures no products alone")

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


@dataclass(frozen=True)
class ExportedBench(Bench):
    """A runtime that opens what an exporter wrote."""

    target: ClassVar[str]
    """Name of the exporter."""
    options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Of the exporter."""
    storage_dtype: ClassVar[torch.dtype] = torch.float32
    """Of dense weights in its files."""

    @property
    def exporter(self) -> Exporter:
        """With its options."""
        return EXPORTERS[self.target].model_validate(self.options)

    @override
    def held_bytes(self, matrix: Matrix) -> int:
        if matrix.form == DENSE:
            return self.storage_dtype.itemsize * matrix.weights
        site = CodedLinear("", named_scheme(matrix.form), matrix.outputs, matrix.inputs)
        return sum(bytes_of(kind) for kind in self.exporter.tensors(site, self.storage_dtype).values())

    @override
    def save(self, model: PreTrainedModel, folder: Path) -> None:
        self.exporter.write(model, folder, Writing(self.storage_dtype, tokenizer=byte_tokenizer()))


class Unmeasurable(Exception):
    """Why a runtime computes no such product."""


BENCHES: Registry[Bench] = Registry("bench", "llmcompress.plan_search.costs.benches")


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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token: for files that need a tokenizer. llama.cpp needs one merge too."""
    vocabulary = {each: number for number, each in enumerate([*sorted(ByteLevel.alphabet()), "th"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def random_expression(matrix: Matrix, owner: str, *, tied: bool) -> Expression:
    """The same as exporters read it."""
    linear = random_linear(matrix, torch.float32, torch.device("cpu"))
    form: Quantized | Dense = Dense(linear.weight) if isinstance(linear, torch.nn.Linear) else linear.leaf()
    return Tied(owner, form) if tied else form
