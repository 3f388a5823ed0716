"""Transforms of an input before a matrix reads it. O = outputs, I = original inputs, K = transformed inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from llmcompress.numerics.clusters import round_by_clusters
from llmcompress.numerics.hadamard import transformed


@dataclass(frozen=True, eq=False)
class InputChange(ABC):
    """Something done to the last axis of an input, the same for every token."""

    is_linear: ClassVar[bool] = True
    """Whether it is a matrix that can be folded into the weight after it."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """What the matrix is given."""

    def reads(self, inputs: int) -> int:
        """How many inputs come where the matrix reads `inputs`."""
        return inputs

    @abstractmethod
    def taken_in(self, weight_OK: Tensor) -> Tensor:
        """The weight O×I that computes from the input itself what `weight_OK` computes from the changed one; of a
        change that is not linear, what is computed where it changes nothing.
        """


@dataclass(frozen=True, eq=False)
class Selection(InputChange):
    """Gathers the inputs numbered `index_K` and no others; all of them in another order is a permutation."""

    index_K: Tensor
    inputs: int

    @property
    def is_permutation(self) -> bool:
        """Whether all inputs are kept."""
        return len(self.index_K) == self.inputs

    @override
    def __call__(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.index_K)

    @override
    def reads(self, inputs: int) -> int:
        return self.inputs

    @override
    def taken_in(self, weight_OK: Tensor) -> Tensor:
        return weight_OK.new_zeros(len(weight_OK), self.inputs).index_copy(1, self.index_K, weight_OK)


@dataclass(frozen=True, eq=False)
class Hadamard(InputChange):
    """The orthogonal Hadamard transform of `numerics/hadamard.py`."""

    width: int

    @override
    def __call__(self, x: Tensor) -> Tensor:
        return transformed(x, self.width)

    @override
    def taken_in(self, weight_OK: Tensor) -> Tensor:
        return transformed(weight_OK, self.width, inverse=True)


@dataclass(frozen=True, eq=False)
class FixedRounding(InputChange):
    """Every channel to a fixed grid of its own and back; scale 0: as it comes."""

    is_linear: ClassVar[bool] = False

    scale_I: Tensor
    zero_I: Tensor
    bits: int

    @override
    def __call__(self, x: Tensor) -> Tensor:
        return round_by_clusters(x, self.scale_I, self.zero_I, self.bits)

    @override
    def taken_in(self, weight_OK: Tensor) -> Tensor:
        return weight_OK


@dataclass(frozen=True, eq=False)
class Threshold(InputChange):
    """Inputs whose magnitude is not above `threshold` count as zero."""

    is_linear: ClassVar[bool] = False

    threshold: float

    @override
    def __call__(self, x: Tensor) -> Tensor:
        return x * (x.abs() > self.threshold)

    @override
    def taken_in(self, weight_OK: Tensor) -> Tensor:
        return weight_OK


@dataclass(frozen=True, eq=False)
class Int8WithOutliers(InputChange):
    """Inputs to int8, a scale per token; channels in which any token goes beyond `outlier` stay float16.

    Source: Dettmers et al., arXiv 2208.07339 (LLM.int8()), as bitsandbytes computes it.
    """

    is_linear: ClassVar[bool] = False

    outlier: float

    @override
    def __call__(self, x: Tensor) -> Tensor:
        half = x.to(torch.float16).flatten(0, -2)
        far = half.abs() >= self.outlier
        small = half.masked_fill(far, 0).float()
        scale = small.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float16).tiny) / 127
        rounded = (small / scale).round() * scale
        return torch.where(far.any(0), half.float(), rounded).view(x.shape).to(x.dtype)

    @override
    def taken_in(self, weight_OK: Tensor) -> Tensor:
        return weight_OK
