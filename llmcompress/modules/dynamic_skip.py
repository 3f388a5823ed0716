"""Layer skipping: a small linear test before each block foretells how little it would change a token."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from llmcompress.modules.base import MODULES, Spec
from llmcompress.modules.dynamic import DynamicBlock


@MODULES.register("skip_block")
class SkipBlock(DynamicBlock):
    """Skips the block inside for tokens whose foretold influence lies below `threshold` (0: for none).

    Influence is 1 - cos(what goes in, what comes out); `router_D` and `bias` foretell its logarithm from the state that
    goes in, brought to unit mean square. It is above 0 whatever they say, so at threshold 0 the block always runs.
    """

    def __init__(self, router_D: Tensor, *, bias: float, threshold: float) -> None:
        super().__init__()
        self.router_D = nn.Parameter(router_D, requires_grad=False)
        self.bias, self.threshold = bias, threshold

    @override
    def spec(self) -> Spec:
        return {"width": len(self.router_D), "bias": self.bias, "threshold": self.threshold}

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        router_D = torch.zeros(int(spec["width"]), dtype=dtype)
        return cls(router_D, bias=float(spec["bias"]), threshold=float(spec["threshold"]))

    @override
    def skips(self, hidden_BTD: Tensor) -> Tensor:
        return self.foretell(hidden_BTD) < self.threshold

    def foretell(self, hidden_BTD: Tensor) -> Tensor:
        """The influence that the block would have on each token."""
        return (unit_mean_square(hidden_BTD) @ self.router_D.float() + self.bias).exp()


def unit_mean_square(hidden_BTD: Tensor) -> Tensor:
    """Each state divided by its root mean square, in float32; a state of zeros stays."""
    hidden_BTD = hidden_BTD.float()
    mean = hidden_BTD.square().mean(-1, keepdim=True)
    return hidden_BTD * mean.clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
