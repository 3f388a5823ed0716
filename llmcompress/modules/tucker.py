"""A linear of heads as a Tucker decomposition of (heads, rows of a head, inputs): axes H, R, I with ranks h, r, i."""

from __future__ import annotations

from typing import Literal, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.modules.base import MODULES, CompressedModule, Spec, TrainableTwin
from llmcompress.modules.expression import Expression
from llmcompress.modules.expression_leaves import Contraction
from llmcompress.modules.trainable import TwinOfParts
from llmcompress.modules.trainable_roles import TrainableRoles

Split = Literal["rows", "columns"]


@MODULES.register("tucker")
class TuckerLinear(CompressedModule):
    """All heads share one factor for their rows and one for the inputs, combined by the core.

    `split` says on which side of the matrix the heads are: `rows` (queries, keys, values: the outputs are H·R) or
    `columns` (the output projection: the inputs are H·R and the third axis are the outputs).
    """

    def __init__(
        self,
        core_hri: Tensor,
        heads_Hh: Tensor,
        rows_Rr: Tensor,
        across_Ii: Tensor,
        bias: Tensor | None,
        *,
        split: Split,
    ) -> None:
        super().__init__()
        self.split: Split = split
        inside, across = len(heads_Hh) * len(rows_Rr), len(across_Ii)
        self.out_features, self.in_features = (inside, across) if split == "rows" else (across, inside)
        self.core_hri, self.heads_Hh = nn.Parameter(core_hri, False), nn.Parameter(heads_Hh, False)
        self.rows_Rr, self.across_Ii = nn.Parameter(rows_Rr, False), nn.Parameter(across_Ii, False)
        self.bias = None if bias is None else nn.Parameter(bias, False)

    @override
    def spec(self) -> Spec:
        return {
            "split": self.split,
            "shape": [len(self.heads_Hh), len(self.rows_Rr), len(self.across_Ii)],
            "ranks": list(self.core_hri.shape),
            "bias": self.bias is not None,
        }

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        heads, rows, across = spec["shape"]
        h, r, i = spec["ranks"]
        outputs = heads * rows if spec["split"] == "rows" else across
        bias = torch.zeros(outputs, dtype=dtype) if spec["bias"] else None
        return cls(
            torch.zeros(h, r, i, dtype=dtype),
            torch.zeros(heads, h, dtype=dtype),
            torch.zeros(rows, r, dtype=dtype),
            torch.zeros(across, i, dtype=dtype),
            bias,
            split=spec["split"],
        )

    @override
    def expression(self) -> Expression:
        result = "HRI" if self.split == "rows" else "IHR"
        factors = (self.core_hri, self.heads_Hh, self.rows_Rr, self.across_Ii)
        size = (self.out_features, self.in_features)
        return Contraction(f"hri,Hh,Rr,Ii->{result}", factors, size, bias=self.bias)

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.split == "rows":
            small = torch.einsum("...i,hri->...hr", x @ self.across_Ii, self.core_hri)
            out = (self.heads_Hh @ small @ self.rows_Rr.T).flatten(-2)
        else:
            heads = x.reshape(*x.shape[:-1], len(self.heads_Hh), len(self.rows_Rr))
            small = self.heads_Hh.T @ heads @ self.rows_Rr
            out = torch.einsum("...hr,hri->...i", small, self.core_hri) @ self.across_Ii.T
        return out if self.bias is None else out + self.bias

    @override
    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, ranks {tuple(self.core_hri.shape)} of {self.spec()['shape']}"

    @override
    def trainable(self, wanted: TrainableRoles) -> TrainableTwin:
        return TwinOfParts(self, wanted.with_matrices_as("factors"))
