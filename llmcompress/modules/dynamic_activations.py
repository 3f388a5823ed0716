"""A linear that ignores small inputs and does not read their weight columns. O = outputs, I = inputs."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from llmcompress.modules.base import MODULES, CompressedModule, Spec, TrainableTwin
from llmcompress.modules.dynamic import Tally
from llmcompress.modules.expression import Expression, InputTransform
from llmcompress.modules.expression_leaves import Dense
from llmcompress.modules.input_transforms import Threshold
from llmcompress.modules.trainable import TwinOfParts
from llmcompress.modules.trainable_roles import TrainableRoles

GATHER_BELOW = 0.45
"""Share of inputs below which picking their columns beats one dense product over one token (measured on a CPU: picked
columns are read at about half the speed of a whole matrix; see evals/dynamic.py)."""


@MODULES.register("thresholded_linear")
class ThresholdedLinear(CompressedModule):
    """`W (x · [|x| > threshold]) + b`: with threshold 0 exactly the linear.

    The weight is kept as I×O, so that the column of one input lies in one piece. For a single token only the columns
    of the inputs that remain are read; for several tokens the small inputs are zeroed and the product is dense, which
    gives the same numbers and no saving.

    Source: Liu et al. (TEAL), arXiv 2408.14690; Lee et al. (CATS), arXiv 2404.08763.
    Differs: the columns are summed by `embedding_bag`, which stock torch has for CPU and GPU, in the place of a kernel
    of their own.
    """

    tally: Tally | None = None
    bias: nn.Parameter | None

    def __init__(self, columns_IO: Tensor, bias_O: Tensor | None, threshold: float) -> None:
        super().__init__()
        self.in_features, self.out_features = columns_IO.shape
        self.threshold = threshold
        self.columns_IO = nn.Parameter(columns_IO, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)

    @override
    def spec(self) -> Spec:
        return {
            "outputs": self.out_features,
            "inputs": self.in_features,
            "bias": self.bias is not None,
            "threshold": self.threshold,
        }

    @classmethod
    @override
    def from_spec(cls, spec: Spec, dtype: torch.dtype) -> Self:
        outputs, inputs = int(spec["outputs"]), int(spec["inputs"])
        bias_O = torch.zeros(outputs, dtype=dtype) if spec["bias"] else None
        return cls(torch.zeros(inputs, outputs, dtype=dtype), bias_O, float(spec["threshold"]))

    @override
    def expression(self) -> Expression:
        return InputTransform(Threshold(self.threshold), Dense(self.columns_IO.T, bias=self.bias))

    @override
    def forward(self, x: Tensor) -> Tensor:
        active = x.abs() > self.threshold
        if self.tally:
            self.tally.total += active.numel()
            self.tally.active += int(active.sum())
            self.tally.calls += 1
        if x.numel() == self.in_features:
            picked_K = active.view(-1).nonzero().view(-1)
            if len(picked_K) <= GATHER_BELOW * self.in_features:
                return self._sum_of_columns(x.view(-1), picked_K).view(*x.shape[:-1], self.out_features)
        return functional.linear(x * active, self.columns_IO.T, self.bias)

    def _sum_of_columns(self, x_I: Tensor, picked_K: Tensor) -> Tensor:
        """One bag of columns per thread: a bag is summed by one thread."""
        if not len(picked_K):
            return x_I.new_zeros(self.out_features) if self.bias is None else self.bias.clone()
        bags = 1 if x_I.is_cuda else torch.get_num_threads()
        starts = torch.arange(bags, device=x_I.device) * (len(picked_K) // bags)
        sums_BO = functional.embedding_bag(
            picked_K, self.columns_IO, starts, mode="sum", per_sample_weights=x_I[picked_K]
        )
        total_O = sums_BO.sum(0)
        return total_O if self.bias is None else total_O + self.bias

    @override
    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, inputs above {self.threshold:g}"

    @override
    def trainable(self, wanted: TrainableRoles) -> TrainableTwin:
        return TwinOfParts(self, wanted)
