"""Multiplies units by gates during training, and folds the gates into the weights afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.model.site import LinearSite
from llmcompress.model.units import UnitGroup

Gates = Callable[[], Sequence[Tensor]]
"""One vector of gates per group, asked for once in every forward pass."""


@contextmanager
def gated(model: nn.Module, groups: Sequence[UnitGroup], gates: Gates) -> Iterator[None]:
    """Every reader's input is multiplied by its units' gates, for as long as the context lasts."""
    now: list[Tensor] = []

    def ask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now[:] = gates()

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(ask, with_kwargs=True).remove)
        for index, group in enumerate(groups):
            for name in group.readers:
                reader = model.get_submodule(name)
                device = reader.get_parameter("weight").device
                hook = _multiply(now, index, group.unit_of_column(device))
                stack.callback(reader.register_forward_pre_hook(hook).remove)
        yield


def _multiply(
    now: list[Tensor], index: int, owner_I: Tensor
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def multiply(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * per_column(now[index], owner_I).to(args[0].dtype), *args[1:])

    return multiply


def per_column(gate_U: Tensor, owner_I: Tensor) -> Tensor:
    """The gate of every column; 1 for columns of no unit."""
    return torch.cat([gate_U, gate_U.new_ones(1)])[torch.where(owner_I < 0, len(gate_U), owner_I)]


def fold_gates(sites: Sequence[LinearSite], groups: Sequence[UnitGroup], gates: Sequence[Tensor]) -> None:
    """Multiply the columns of every reader by its units' gates: the model computes what it did inside `gated`."""
    by_name = {site.name: site for site in sites}
    for group, gate_U in zip(groups, gates, strict=True):
        for name in group.readers:
            weight_OI = by_name[name].weight_OI
            gate_I = per_column(gate_U.detach().to(weight_OI), group.unit_of_column(weight_OI.device))
            by_name[name].write(weight_OI * gate_I)
