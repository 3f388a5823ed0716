"""A linear site: the only handle a pass may use on a linear of any class or storage layout. O = outputs, I = inputs."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from llmcompress.model.map import SiteInfo
from llmcompress.modules.base import CompressedModule
from llmcompress.numerics.masks import lie_on_a_grid
from llmcompress.numerics.statistics import Statistic

S = TypeVar("S", bound=Statistic)

_SINGLE_ZEROS = 0.01
"""Of the weights of a linear: what tools prune is more."""


class LinearSite:
    """A live linear of one block: read and write its weight as float32 O×I, or replace it."""

    def __init__(
        self, name: str, info: SiteInfo, block: nn.Module, storage_dtype: torch.dtype, *, zeros_are_masks: bool = True
    ) -> None:
        self.name = name
        self.info = info
        self.storage_dtype = storage_dtype
        self._zeros_are_masks = zeros_are_masks
        self._block = block
        self._statistics: dict[type[Statistic], Statistic] = {}

    @property
    def module(self) -> nn.Module:
        """The current module at the site."""
        return self._block.get_submodule(self.info.name)

    @property
    def is_compressed(self) -> bool:
        """Whether a compressed module is at the site, which has no dense weight to change."""
        return isinstance(self.module, CompressedModule)

    @property
    def weight_OI(self) -> Tensor:
        """A float32 copy of the weight, outputs × inputs; the matrix it represents if compressed."""
        module = self.module
        if isinstance(module, CompressedModule):
            return module.dense_weight().detach().float().clone()
        weight = module.weight
        assert isinstance(weight, Tensor)
        return (weight.T if self.info.transposed else weight).detach().float().clone()

    @property
    def pruned_OI(self) -> Tensor:
        """True where a weight is zero because it was pruned, and so stays zero.

        Zeros of a checkpoint that was dequantized are none, unless a pass of this recipe leaves zeros.
        """
        weight_OI = self.weight_OI
        zero_OI = weight_OI == 0
        return zero_OI if self._zeros_are_masks or not lie_on_a_grid(weight_OI) else torch.zeros_like(zero_OI)

    @property
    def is_pruned(self) -> bool:
        """Whether it has zeros that must stay. Single zeros of a checkpoint, less than 1 % of a linear, are none."""
        return float(self.pruned_OI.float().mean()) > (0.0 if self._zeros_are_masks else _SINGLE_ZEROS)

    @property
    def bias_O(self) -> Tensor | None:
        """A copy of the bias, if there is one."""
        bias = self.module.bias
        return bias.detach().clone() if isinstance(bias, Tensor) else None

    def write(self, weight_OI: Tensor) -> None:
        """Set the dense weight."""
        assert not self.is_compressed, f"{self.name} is compressed already"
        with torch.no_grad():
            self._block.get_parameter(f"{self.info.name}.weight").copy_(
                weight_OI.T if self.info.transposed else weight_OI
            )

    def write_bias(self, bias_O: Tensor) -> None:
        """Set the bias; a linear without one gets one."""
        module = self.module
        assert not self.is_compressed and hasattr(module, "bias"), f"{self.name} is compressed already"
        like = self._block.get_parameter(f"{self.info.name}.weight")
        module.bias = nn.Parameter(bias_O.detach().to(like), requires_grad=like.requires_grad)

    def replace(self, module: nn.Module) -> None:
        """Replace the module at the site."""
        parent, _, leaf = self.info.name.rpartition(".")
        setattr(self._block.get_submodule(parent), leaf, module)

    def statistic(self, kind: type[S]) -> S:
        """A statistic of this site's input, measured for the current pass."""
        found = self._statistics[kind]
        assert isinstance(found, kind)
        return found

    def statistics(self) -> tuple[Statistic, ...]:
        """All measured statistics; sites that share an input share these objects."""
        return tuple(self._statistics.values())

    def set_statistics(self, statistics: dict[type[Statistic], Statistic]) -> None:
        """Called by the stream; an empty dict drops them."""
        self._statistics = statistics
