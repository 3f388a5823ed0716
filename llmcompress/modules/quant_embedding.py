"""Quantized embeddings, and output heads that share their table. V = entries, D = width."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from llmcompress.modules.base import MODULES, CompressedModule, Spec, TrainableTwin
from llmcompress.modules.expression import Expression, Gather, Tied
from llmcompress.modules.expression_leaves import Leaf, Quantized
from llmcompress.modules.quant_linear import QuantLinear
from llmcompress.modules.scheme import Scheme
from llmcompress.numerics.grid import Fitted
from llmcompress.numerics.quantized import QuantizedTensor


@MODULES.register("quant_embedding")
class QuantEmbedding(QuantLinear):
    """Restores only the rows that are looked up; `multiplier` is what the embedding's class multiplies them by."""

    has_stock_format: ClassVar[bool] = False

    multiplier: float = 1.0

    @classmethod
    def of(cls, scheme: Scheme, codes_VD: Tensor, fitted: Fitted, multiplier: float) -> Self:
        """From the result of rounding a table."""
        made = cls.from_fitted(scheme, codes_VD, fitted, None)
        made.multiplier = multiplier
        return made

    @property
    def num_embeddings(self) -> int:
        """Entries, under the name that ordinary embeddings have for it."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Width, under the name that ordinary embeddings have for it."""
        return self.in_features

    @override
    def spec(self) -> Spec:
        return {**super().spec(), "multiplier": self.multiplier}

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        made = super().from_spec(spec, dtype)
        made.multiplier = float(spec["multiplier"])
        return made

    @override
    def computed(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        rows = functional.embedding(x, weight_OI)
        return rows if self.multiplier == 1.0 else rows * self.multiplier

    @override
    def with_codes(self, tensor: QuantizedTensor, bias_O: Tensor | None) -> Self:
        made = super().with_codes(tensor, bias_O)
        made.multiplier = self.multiplier
        return made

    @override
    def expression(self) -> Expression:
        return Gather(Quantized(self.quantized), self.multiplier)

    @override
    def forward(self, ids: Tensor) -> Tensor:
        rows = self.quantized.rows(ids.reshape(-1)).dense()
        rows = rows if self.multiplier == 1.0 else rows * self.multiplier
        return rows.reshape(*ids.shape, self.in_features)


@MODULES.register("shared_head")
class SharedHead(CompressedModule):
    """A head that multiplies by the embedding's table: it has no numbers of its own but an optional bias."""

    bias: nn.Parameter | None
    frame: ClassVar[bool] = True

    def __init__(self, table: str, outputs: int, inputs: int, bias_V: Tensor | None) -> None:
        super().__init__()
        self.table, self.out_features, self.in_features = table, outputs, inputs
        self.bias = None if bias_V is None else nn.Parameter(bias_V, requires_grad=False)
        self._model: tuple[nn.Module, ...] = ()

    @override
    def spec(self) -> Spec:
        sizes = {"outputs": self.out_features, "inputs": self.in_features}
        return {"table": self.table, **sizes, "bias": self.bias is not None}

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        outputs = int(spec["outputs"])
        bias_V = torch.zeros(outputs, dtype=dtype) if spec["bias"] else None
        return cls(str(spec["table"]), outputs, int(spec["inputs"]), bias_V)

    @override
    def connect(self, model: nn.Module) -> None:
        # in a tuple, or the model would become a part of its own part
        self._model = (model,)

    @override
    def expression(self) -> Expression:
        assert self._model, "a shared head must be connected"
        found = self._model[0].get_submodule(self.table)
        assert isinstance(found, CompressedModule)
        embedding = found.expression()
        assert isinstance(embedding, Gather) and isinstance(embedding.table, Leaf)
        return Tied(self.table, replace(embedding.table, bias=self.bias))

    @override
    def dense_weight(self) -> Tensor:
        """The table, also while it is trained."""
        found = self._model[0].get_submodule(self.table)
        assert isinstance(found, CompressedModule | TrainableTwin)
        return found.dense_weight()

    @override
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.dense_weight(), self.bias)
