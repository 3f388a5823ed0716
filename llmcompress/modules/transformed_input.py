"""Linears with a transformed input: a Hadamard transform, or quantization by clusters."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.modules.base import MODULES, CompressedModule, Spec, TrainableTwin
from llmcompress.modules.expression import Expression, InputTransform
from llmcompress.modules.input_transforms import FixedRounding, Hadamard, InputChange, Selection
from llmcompress.modules.low_rank import part_bias, part_expression, part_from_spec, part_shape, part_spec
from llmcompress.modules.trainable import TwinOfParts
from llmcompress.modules.trainable_roles import TrainableRoles


class TransformedInput(CompressedModule):
    """`kept` is an ordinary linear at first, which later passes find, measure and may quantize.

    O = outputs, I = inputs, K = clusters.
    """

    kept: nn.Module

    def __init__(self, kept: nn.Module) -> None:
        super().__init__()
        self.kept = kept
        self.out_features, self.in_features = part_shape(kept)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the linear that it stands for."""
        return part_bias(self.kept)

    @override
    def spec(self) -> Spec:
        return {"kept": part_spec(self.kept)}

    @abstractmethod
    def changes(self) -> tuple[InputChange, ...]:
        """What happens before the linear, in order."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        for change in self.changes():
            x = change(x)
        out: Tensor = self.kept(x)
        return out

    @override
    def expression(self) -> Expression:
        made = part_expression(self.kept)
        for change in reversed(self.changes()):
            made = InputTransform(change, made)
        return made

    @override
    def trainable(self, wanted: TrainableRoles) -> TrainableTwin:
        return TwinOfParts(self, wanted)


@MODULES.register("rotated_input")
class RotatedInput(TransformedInput):
    """`W Hᵀ (H x) + b`: an online Hadamard transform, which spreads outliers before anything is rounded.

    Source: Ashkboos et al. (QuaRot), arXiv 2404.00456.
    """

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        return cls(part_from_spec(spec["kept"], dtype))

    @override
    def changes(self) -> tuple[InputChange, ...]:
        return (Hadamard(self.in_features),)

    @override
    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, Hadamard transform before"


@MODULES.register("clustered_input")
class ClusteredInput(TransformedInput):
    """Gathers channels so that those of one cluster stand together, and rounds each cluster on a fixed grid.

    `index_I` (None: they stand so already) says which channel comes where; `scale_K` and `zero_K` belong to the
    clusters, of `sizes` channels one after the other. A scale of 0 does not round: nothing was seen there.

    Source: Yuan et al. (RPTQ), arXiv 2304.01089.
    """

    index_I: Tensor | None
    scale_K: Tensor
    zero_K: Tensor

    def __init__(
        self,
        kept: nn.Module,
        *,
        sizes: tuple[int, ...],
        bits: int | None,
        scale_K: Tensor,
        zero_K: Tensor,
        index_I: Tensor | None,
    ) -> None:
        super().__init__(kept)
        assert sum(sizes) == self.in_features and len(sizes) == len(scale_K) == len(zero_K)
        self.sizes, self.bits = sizes, bits
        self.register_buffer("scale_K", scale_K)
        self.register_buffer("zero_K", zero_K)
        self.register_buffer("index_I", index_I)

    @override
    def spec(self) -> Spec:
        return {**super().spec(), "sizes": list(self.sizes), "bits": self.bits, "gathers": self.index_I is not None}

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        kept, sizes = part_from_spec(spec["kept"], dtype), tuple(int(size) for size in spec["sizes"])
        return cls(
            kept,
            sizes=sizes,
            bits=None if spec["bits"] is None else int(spec["bits"]),
            scale_K=torch.zeros(len(sizes), dtype=dtype),
            zero_K=torch.zeros(len(sizes), dtype=torch.int32),
            index_I=torch.arange(sum(sizes)) if spec["gathers"] else None,
        )

    @override
    def changes(self) -> tuple[InputChange, ...]:
        gathers = () if self.index_I is None else (Selection(self.index_I, self.in_features),)
        if self.bits is None:
            return gathers
        return (*gathers, FixedRounding(self._spread(self.scale_K), self._spread(self.zero_K), self.bits))

    def _spread(self, values_K: Tensor) -> Tensor:
        sizes = torch.tensor(self.sizes, device=values_K.device)
        return values_K.repeat_interleave(sizes, output_size=self.in_features)

    @override
    def extra_repr(self) -> str:
        rounded = "" if self.bits is None else f" of {self.bits} bits"
        return f"{self.in_features} → {self.out_features}, inputs in {len(self.sizes)} clusters{rounded}"


def unwrapped(module: nn.Module) -> Any:
    """The linear inside, or the module itself where nothing happens before it."""
    return module.kept if isinstance(module, TransformedInput) else module
