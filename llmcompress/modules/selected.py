"""Linears that compute only some of their rows, or read only some of their columns. O = outputs, I = inputs, K = kept.

The code around them keeps its shapes: attention, rotary tables and caches stay stock and see zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.modules.base import MODULES, CompressedModule, Spec, TrainableTwin
from llmcompress.modules.expression import Expression, InputTransform, OutputPlaces
from llmcompress.modules.input_transforms import Selection
from llmcompress.modules.low_rank import linear_of, part_bias, part_expression, part_from_spec, part_shape, part_spec
from llmcompress.modules.trainable import TwinOfParts
from llmcompress.modules.trainable_roles import TrainableRoles


class _Selected(CompressedModule):
    """`kept` is an ordinary linear at first, which later passes find, measure and may quantize."""

    kept: nn.Module
    index_K: Tensor

    def __init__(self, kept: nn.Module, full: int, index_K: Tensor) -> None:
        super().__init__()
        self.kept, self.full = kept, full
        self.register_buffer("index_K", index_K)

    @override
    def spec(self) -> Spec:
        return {"kept": part_spec(self.kept), "full": self.full}

    @override
    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {len(self.index_K)} of {self.full} kept"

    @override
    def trainable(self, wanted: TrainableRoles) -> TrainableTwin:
        return TwinOfParts(self, wanted)


@MODULES.register("selected_rows")
class SelectedRows(_Selected):
    """Computes the outputs numbered `index_K`; all others are zero."""

    def __init__(self, kept: nn.Module, full: int, index_K: Tensor) -> None:
        super().__init__(kept, full, index_K)
        self.out_features, self.in_features = full, part_shape(kept)[1]

    @classmethod
    def from_rows(cls, weight_KI: Tensor, bias_K: Tensor | None, *, rows: Sequence[int], outputs: int) -> Self:
        """From the rows that stay, in the order of `rows`."""
        return cls(linear_of(weight_KI, bias_K), outputs, _index(rows, weight_KI))

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        kept = part_from_spec(spec["kept"], dtype)
        return cls(kept, int(spec["full"]), torch.zeros(part_shape(kept)[0], dtype=torch.int64))

    @override
    def expression(self) -> Expression:
        return OutputPlaces(part_expression(self.kept), self.index_K, self.full)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the linear that it stands for: zero where no row is."""
        bias_K = part_bias(self.kept)
        return None if bias_K is None else bias_K.new_zeros(self.out_features).index_copy(0, self.index_K, bias_K)

    @override
    def forward(self, x: Tensor) -> Tensor:
        kept: Tensor = self.kept(x)
        return kept.new_zeros(*kept.shape[:-1], self.out_features).index_copy(-1, self.index_K, kept)


@MODULES.register("selected_columns")
class SelectedColumns(_Selected):
    """Reads the inputs numbered `index_K` and no others."""

    def __init__(self, kept: nn.Module, full: int, index_K: Tensor) -> None:
        super().__init__(kept, full, index_K)
        self.out_features, self.in_features = part_shape(kept)[0], full

    @classmethod
    def from_columns(cls, weight_OK: Tensor, bias_O: Tensor | None, *, columns: Sequence[int], inputs: int) -> Self:
        """From the columns that stay, in the order of `columns`."""
        return cls(linear_of(weight_OK, bias_O), inputs, _index(columns, weight_OK))

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        kept = part_from_spec(spec["kept"], dtype)
        return cls(kept, int(spec["full"]), torch.zeros(part_shape(kept)[1], dtype=torch.int64))

    @override
    def expression(self) -> Expression:
        return InputTransform(Selection(self.index_K, self.full), part_expression(self.kept))

    @property
    def bias(self) -> Tensor | None:
        """The bias of the linear that it stands for."""
        return part_bias(self.kept)

    @override
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.kept(x.index_select(-1, self.index_K))
        return out


def _index(numbers: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64, device=like.device)
