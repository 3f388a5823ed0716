"""Unit allocation: how many units each group loses, uniformly or by the least important of the model. U = units."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from llmcompress.model.units import UnitGroup


@dataclass(frozen=True)
class Request:
    """The request to one group."""

    group: UnitGroup
    fraction: float
    """Fraction of its units to remove; of all groups together under a global budget."""
    multiple: int = 1
    """The number of units that stay is a multiple of this, where the group has that many."""
    floor: float = 0.0
    """Minimum fraction of its units to keep."""


Allocation = Callable[[Sequence[Request], Sequence[Tensor]], list[Tensor]]
"""Requests and priorities (greater: keep) → True for the units that stay."""


def balanced(requests: Sequence[Request]) -> list[Request]:
    """The same, where the channels of a block take what its heads remove too much or too little of.

    A quarter of three key-value groups is one third of the attention or nothing; channels are small enough to bring the
    block's parameters to the fraction asked for.
    """
    missing: dict[str, float] = {}
    channels: dict[str, int] = {}
    for request in requests:
        block, group = request.group.block.name, request.group
        if request.fraction > 0 and group.kind == "heads":
            gone = group.units - kept_units(request)
            missing[block] = missing.get(block, 0.0) + (request.fraction * group.units - gone) * group.parameters
        elif request.fraction > 0:
            channels[block] = channels.get(block, 0) + group.units * group.parameters
    return [
        replace(request, fraction=min(max(request.fraction + missing.get(block, 0.0) / channels[block], 0.0), 0.99))
        if request.fraction > 0 and request.group.kind == "channels"
        else request
        for request in requests
        for block in [request.group.block.name]
    ]


def uniform(requests: Sequence[Request], priorities: Sequence[Tensor]) -> list[Tensor]:
    """Every group keeps its own best units, all equally many where the same is asked: a plain config can say that."""
    return [best(priority_U, kept_units(request)) for request, priority_U in zip(requests, priorities, strict=True)]


def global_budget(requests: Sequence[Request], priorities: Sequence[Tensor]) -> list[Tensor]:
    """The least worthy units of the whole model go, until as many weights are gone as uniform fractions would take.

    Units go in steps that keep the multiples. Every group keeps its floor: without it whole layers vanish, and the
    first and last ones are what the model can least do without.
    """
    target = sum(request.fraction * request.group.units * request.group.parameters for request in requests)
    steps = [
        step
        for index, (request, priority_U) in enumerate(zip(requests, priorities, strict=True))
        if request.fraction > 0
        for step in _steps(index, request, priority_U)
    ]
    keep = [request.group.units for request in requests]
    closed: set[int] = set()
    gone = 0
    for step in sorted(steps):
        weights = step.units * requests[step.index].group.parameters
        # the step is taken when that comes nearer to the target than stopping before it
        if step.index in closed or gone + weights / 2 > target:
            closed.add(step.index)
            continue
        keep[step.index] -= step.units
        gone += weights
    return [best(priority_U, count) for priority_U, count in zip(priorities, keep, strict=True)]


ALLOCATIONS: Mapping[str, Allocation] = MappingProxyType({"uniform": uniform, "global": global_budget})


def kept_units(request: Request) -> int:
    """How many units stay: the multiple nearest to the wanted share, at least one, and all when nothing is asked."""
    units, multiple = request.group.units, request.multiple
    if request.fraction == 0:
        return units
    nearest = multiple * math.floor((1 - request.fraction) * units / multiple + 0.5)
    return min(units, max(nearest, multiple, _least(request)))


def best(priority_U: Tensor, count: int) -> Tensor:
    """True for the `count` greatest; of equals the first."""
    kept_U = torch.zeros(len(priority_U), dtype=torch.bool)
    kept_U[priority_U.cpu().argsort(descending=True, stable=True)[:count]] = True
    return kept_U


@dataclass(frozen=True, order=True)
class _Step:
    """Units of one group that are removed together: their mean priority, and the step's place in the group's order."""

    priority: float
    index: int
    turn: int
    units: int


def _steps(index: int, request: Request, priority_U: Tensor) -> list[_Step]:
    ascending = priority_U.double().cpu().sort().values
    left, least = request.group.units, max(_least(request), min(request.multiple, request.group.units))
    steps: list[_Step] = []
    gone = 0
    while True:
        size = left % request.multiple or request.multiple
        if left - size < least:
            return steps
        steps.append(_Step(float(ascending[gone : gone + size].mean()), index, len(steps), size))
        left, gone = left - size, gone + size


def _least(request: Request) -> int:
    least = max(1, math.ceil(request.floor * request.group.units))
    return min(request.group.units, request.multiple * math.ceil(least / request.multiple))
