"""A linear predictor of a small positive quantity from a token's hidden state. D = hidden size."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override


class LinearPredictor(nn.Module):
    """exp(state of unit mean square · `weight_D` + `bias`): always above 0."""

    def __init__(self, weight_D: Tensor, bias: float) -> None:
        super().__init__()
        self.weight_D = nn.Parameter(weight_D, requires_grad=False)
        self.bias = bias

    def spec(self) -> dict[str, Any]:
        """JSON data that, with the state dict, rebuilds it."""
        return {"width": len(self.weight_D), "bias": self.bias}

    @classmethod
    def from_spec(cls, spec: dict[str, Any], dtype: torch.dtype) -> Self:
        """Empty, of the right width."""
        return cls(torch.zeros(int(spec["width"]), dtype=dtype), float(spec["bias"]))

    @override
    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """The prediction for every token."""
        return (unit_mean_square(hidden_BTD) @ self.weight_D.float() + self.bias).exp()


def unit_mean_square(hidden_BTD: Tensor) -> Tensor:
    """Each state divided by its root mean square, in float32; a state of zeros stays."""
    hidden_BTD = hidden_BTD.float()
    mean = hidden_BTD.square().mean(-1, keepdim=True)
    return hidden_BTD * mean.clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
