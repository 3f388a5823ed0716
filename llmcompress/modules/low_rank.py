"""A linear as two factors, and helpers for factored linears. O = outputs, I = inputs, R = rank."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.modules.base import MODULES, CompressedModule, Spec, TrainableTwin, from_named_spec, named_spec
from llmcompress.modules.expression import Chain, Expression
from llmcompress.modules.expression_leaves import Dense
from llmcompress.modules.trainable import TwinOfParts
from llmcompress.modules.trainable_roles import TrainableRoles

_STOCK = "linear"


@MODULES.register("low_rank")
class LowRankLinear(CompressedModule):
    """`left(right(x))`: `right` maps I to R without bias, `left` maps R to O and has the bias.

    Both are ordinary linears at first, which later passes find, measure and may quantize.
    """

    right: nn.Module
    left: nn.Module

    def __init__(self, right: nn.Module, left: nn.Module) -> None:
        super().__init__()
        self.right, self.left = right, left
        self.rank, self.in_features = part_shape(right)
        self.out_features, inner = part_shape(left)
        assert inner == self.rank, f"factors of rank {self.rank} and {inner}"

    @classmethod
    def from_factors(cls, left_OR: Tensor, right_RI: Tensor, bias_O: Tensor | None) -> Self:
        """From the two matrices and the bias of the linear they replace."""
        made = cls(linear_of(right_RI, None), linear_of(left_OR, bias_O))
        _order_by_column(made.left)
        return made

    @override
    def train(self, mode: bool = True) -> Self:
        """Loading leaves the left factor in row order; it is used in column order (`_order_by_column`)."""
        super().train(mode)
        if not mode:
            _order_by_column(self.left)
        return self

    @override
    def spec(self) -> Spec:
        return {"right": part_spec(self.right), "left": part_spec(self.left)}

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        return cls(part_from_spec(spec["right"], dtype), part_from_spec(spec["left"], dtype))

    @override
    def expression(self) -> Expression:
        return Chain((part_expression(self.right), part_expression(self.left)))

    @property
    def bias(self) -> Tensor | None:
        """The bias of the linear it replaces."""
        return part_bias(self.left)

    @override
    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.left(self.right(x))
        return hidden

    @override
    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.rank} → {self.out_features}"

    @override
    def trainable(self, wanted: TrainableRoles) -> TrainableTwin:
        return TwinOfParts(self, wanted.with_matrices_as("factors"))


def linear_of(weight_OI: Tensor, bias_O: Tensor | None) -> nn.Linear:
    """An ordinary linear that holds these tensors."""
    linear = _empty(*weight_OI.shape, bias=bias_O is not None, dtype=weight_OI.dtype, device=weight_OI.device)
    linear.weight = nn.Parameter(weight_OI.detach())
    if bias_O is not None:
        linear.bias = nn.Parameter(bias_O.detach().to(weight_OI.dtype))
    return linear


def part_spec(part: nn.Module) -> Spec:
    """What, with its tensors, makes a part again: an ordinary linear or a compressed one."""
    if isinstance(part, CompressedModule):
        return named_spec(part)
    outputs, inputs = part_shape(part)
    return {"type": _STOCK, "outputs": outputs, "inputs": inputs, "bias": part_bias(part) is not None}


def part_from_spec(spec: Spec, dtype: torch.dtype) -> nn.Module:
    """The part that `part_spec` described, empty, on the default device."""
    if spec["type"] != _STOCK:
        return from_named_spec(spec, dtype)
    return _empty(
        int(spec["outputs"]),
        int(spec["inputs"]),
        bias=bool(spec["bias"]),
        dtype=dtype,
        device=torch.get_default_device(),
    )


def part_expression(part: nn.Module) -> Expression:
    """What a part computes."""
    if isinstance(part, CompressedModule):
        return part.expression()
    assert isinstance(part.weight, Tensor)
    return Dense(part.weight, bias=part_bias(part))


def part_bias(part: nn.Module) -> Tensor | None:
    """The bias of a part, if it has one."""
    bias = getattr(part, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def part_shape(part: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a part."""
    outputs, inputs = part.out_features, part.in_features
    assert isinstance(outputs, int) and isinstance(inputs, int)
    return outputs, inputs


def factors_of(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter] | None:
    """Left (O×R) and right (R×I) weight of a linear that is two ordinary ones; None for any other module."""
    if not isinstance(module, LowRankLinear):
        return None
    return module.left.get_parameter("weight"), module.right.get_parameter("weight")


def _order_by_column(left: nn.Module) -> None:
    """The same weight, laid out column by column, where an ordinary linear on the CPU has more outputs than inputs.

    The product with one token then walks along the outputs, of which there are more: in float32 a fifth to a half of
    its time is saved, in bfloat16 a little (docs/log.md). Products with many tokens take as long as before.
    """
    if not isinstance(left, nn.Linear) or left.weight.device.type != "cpu":
        return
    if left.out_features > left.in_features and left.weight.is_contiguous():
        left.weight.data = left.weight.data.T.contiguous().T


def _empty(outputs: int, inputs: int, *, bias: bool, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """Without the random initialization of an ordinary one, which would advance the caller's random generator."""
    linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, inputs, outputs, bias=bias, dtype=dtype, device=device
    )
    assert isinstance(linear, nn.Linear)
    return linear
