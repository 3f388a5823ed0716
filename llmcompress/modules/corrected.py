"""A quantized linear plus a low-rank branch that corrects it: W ≈ Q + L R. O = outputs, I = inputs, R = rank."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.modules.base import MODULES, CompressedModule, Spec, TrainableTwin
from llmcompress.modules.expression import Chain, Expression, Sum
from llmcompress.modules.low_rank import part_bias, part_expression, part_from_spec, part_shape, part_spec
from llmcompress.modules.trainable import TwinOfParts
from llmcompress.modules.trainable_roles import Role, TrainableRoles


@MODULES.register("corrected")
class CorrectedLinear(CompressedModule):
    """`base(x) + left(right(x))`; every part may be an ordinary linear or a quantized one, `base` holds the bias."""

    base: nn.Module
    right: nn.Module
    left: nn.Module

    def __init__(self, base: nn.Module, right: nn.Module, left: nn.Module) -> None:
        super().__init__()
        self.base, self.right, self.left = base, right, left
        self.out_features, self.in_features = part_shape(base)
        self.rank = part_shape(right)[0]
        assert part_shape(right) == (self.rank, self.in_features) and part_shape(left) == (self.out_features, self.rank)

    @override
    def spec(self) -> Spec:
        return {name: part_spec(part) for name, part in self.named_children()}

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        base, right, left = (part_from_spec(spec[name], dtype) for name in ("base", "right", "left"))
        return cls(base, right, left)

    @override
    def expression(self) -> Expression:
        branch = Chain((part_expression(self.right), part_expression(self.left)))
        return Sum((part_expression(self.base), branch))

    @property
    def bias(self) -> Tensor | None:
        """The bias of the linear it replaces."""
        return part_bias(self.base)

    @override
    def forward(self, x: Tensor) -> Tensor:
        main: Tensor = self.base(x)
        repair: Tensor = self.left(self.right(x))
        return main + repair

    @override
    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, branch of rank {self.rank}"

    @override
    def trainable(self, wanted: TrainableRoles) -> TrainableTwin:
        """The branch counts as adapters; where they alone are trained, the base need not be trainable."""
        alone = wanted.roles == {"adapters"} and not isinstance(self.base, CorrectedLinear)
        branch: dict[str, Role] = {"right": "adapters", "left": "adapters"}
        return TwinOfParts(self, wanted, roles=branch, frozen=("base",) if alone else ())


def branched(module: nn.Module) -> CorrectedLinear | None:
    """The module itself if it is a linear with a branch; None for any other."""
    return module if isinstance(module, CorrectedLinear) else None
