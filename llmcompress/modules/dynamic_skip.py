"""Layer skipping: a linear predictor before each block estimates how little the block would change a token."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.modules.base import MODULES, Spec
from llmcompress.modules.dynamic import DynamicBlock
from llmcompress.modules.linear_predictor import LinearPredictor


@MODULES.register("skip_block")
class SkipBlock(DynamicBlock):
    """Skips the wrapped block for tokens with a predicted influence below `threshold` (0: for none).

    Influence is 1 - cos(input, output). Predictions are above 0, so at threshold 0 the block always
    runs.
    """

    def __init__(self, predictor: LinearPredictor, threshold: float) -> None:
        super().__init__()
        self.predictor, self.threshold = predictor, threshold

    @override
    def spec(self) -> Spec:
        return {"predictor": self.predictor.spec(), "threshold": self.threshold}

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        return cls(LinearPredictor.from_spec(spec["predictor"], dtype), float(spec["threshold"]))

    @override
    def skips(self, hidden_BTD: Tensor) -> Tensor:
        below: Tensor = self.predictor(hidden_BTD) < self.threshold
        return below
