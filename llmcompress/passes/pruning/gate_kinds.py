"""How gates are learned, one function per method; each returns a priority and a gate for every unit. U = units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from llmcompress.model.map import WidthPart
from llmcompress.model.units import UnitGroup
from llmcompress.numerics.gates import Budget, cut_through_ranking, hard_concrete, hard_concrete_mean, open_probability
from llmcompress.numerics.importance import per_unit
from llmcompress.passes.pruning.gate_hooks import gated
from llmcompress.training.objectives.penalty import Penalty

START_OPEN = 2.5
"""log α of a gate that is all but surely open at first, and still near enough to the slope to be closed."""
SLOPE = 0.05
"""Width of the soft cut of `dsa`, as a fraction of the units."""
CYCLES = 4
"""Cycles of `decorator`."""
RAMP = 0.5
"""Fraction of the steps over which budgets are approached."""


class TrainGates(Protocol):
    """Trains gates, and the weights unless they are frozen."""

    def __call__(self, gates: Sequence[nn.Parameter], steps: int, penalty: Penalty | None, title: str = "") -> None:
        """For so many steps; a kind that trains several times gives each a title."""


@dataclass(frozen=True)
class Learned:
    """What a method found."""

    priorities: list[Tensor]
    """Greater: keep."""
    gates: list[Tensor]
    """To be multiplied into the weights; 1 where nothing was learned."""


@dataclass(frozen=True)
class Task:
    """What a method works on: a resident model and its units."""

    model: PreTrainedModel
    groups: Sequence[UnitGroup]
    fractions: Sequence[float]
    """Fraction of each group to remove."""
    pooled: bool
    """Whether the fractions bind all groups together, weight for weight, rather than each."""
    strength: float
    steps: int
    kept: Callable[[Sequence[Tensor], float], list[Tensor]]
    """Priorities and a fraction of the training → True for the units kept then."""
    train: TrainGates
    measure: Callable[[], None]
    """Accumulate the gradient of the loss over all calibration windows."""

    def vectors(self, value: float) -> list[nn.Parameter]:
        """A parameter with one number per unit, for every group."""
        device = next(self.model.parameters()).device
        return [nn.Parameter(torch.full((group.units,), value, device=device)) for group in self.groups]

    def targets(self) -> list[float]:
        """The target of `removed`."""
        return [float(share) for share in self.removed([torch.tensor(1 - fraction) for fraction in self.fractions])]

    def removed(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """The removed fraction of each group, or of the weights of all; `kept` are fractions of groups."""
        if not self.pooled:
            return [1 - share for share in kept]
        weights = [group.units * group.parameters for group in self.groups]
        gone = sum((1 - share) * size for share, size in zip(kept, weights, strict=True))
        return [torch.as_tensor(gone) / sum(weights)]

    def budget(self) -> Budget:
        """The penalty that pushes the fractions to their targets."""
        rate = 10 * self.strength / self.steps
        return Budget(self.targets(), ramp_steps=round(RAMP * self.steps), rate=rate, quadratic=self.strength)


class OverBudget(Penalty):
    """Penalizes the distance to the budget, with growing Lagrange multipliers."""

    def __init__(self, budget: Budget, removed: Callable[[], Sequence[Tensor]]) -> None:
        self._budget, self._removed = budget, removed

    @override
    def value(self, step: int) -> Tensor:
        return self._budget.penalty(self._removed(), step)

    @override
    def state(self) -> dict[str, Tensor]:
        return {"multipliers": self._budget.multipliers}

    @override
    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._budget.multipliers = state["multipliers"]


class Pull(Penalty):
    """A constant penalty."""

    def __init__(self, size: Callable[[], Tensor]) -> None:
        self._size = size

    @override
    def value(self, step: int) -> Tensor:
        return self._size()


def learn_hard_concrete(task: Task) -> Learned:
    """Random gates whose expected number is held to the budget.

    Source: Louizos et al., arXiv 1712.01312; for heads layer by layer Shim et al., arXiv 2110.03252.
    """
    openness = task.vectors(START_OPEN)

    def gates() -> list[Tensor]:
        if not torch.is_grad_enabled():
            return [hard_concrete_mean(each) for each in openness]
        return [hard_concrete(each, torch.rand_like(each)) for each in openness]

    def removed() -> list[Tensor]:
        return task.removed([open_probability(each).mean() for each in openness])

    with gated(task.model, task.groups, gates):
        task.train(openness, task.steps, OverBudget(task.budget(), removed))
    return Learned([each.detach() for each in openness], [hard_concrete_mean(each.detach()) for each in openness])


def learn_slimming(task: Task) -> Learned:
    """Plain gates under an L1 penalty.

    Source: Liu et al., arXiv 1708.06519 (network slimming), with gates of their own: these models have no batch norm.
    """
    gates = task.vectors(1.0)

    def size() -> Tensor:
        return task.strength * torch.stack([each.abs().mean() for each in gates]).mean()

    with gated(task.model, task.groups, lambda: gates):
        task.train(gates, task.steps, Pull(size))
    return Learned([each.detach().abs() for each in gates], [each.detach() for each in gates])


def learn_group_lasso(task: Task) -> Learned:
    """No gates: the weights that belong to a unit are pulled to zero together.

    Source: Wen et al., arXiv 1608.03665 (structured sparsity learning).
    """

    def norms() -> list[Tensor]:
        squares = [_squares(task.model, group) for group in task.groups]
        means = [each / group.parameters for each, group in zip(squares, task.groups, strict=True)]
        # the smallest addend keeps the root differentiable at zero
        return [(each + torch.finfo(each.dtype).tiny).sqrt() for each in means]

    start = [each.detach().mean() for each in norms()]

    def size() -> Tensor:
        return task.strength * torch.stack([each.mean() / at for each, at in zip(norms(), start, strict=True)]).mean()

    task.train([], task.steps, Pull(size))
    with torch.no_grad():
        return Learned(norms(), [torch.ones_like(each) for each in norms()])


def learn_dsa(task: Task) -> Learned:
    """A keep fraction for every group is learned through a soft cut in the ranking of its units, under the budget.

    Source: Ning et al., arXiv 2004.02164. Differs: an augmented Lagrangian instead of ADMM; units are ranked by
    |∂L/∂gate| at the start.
    """
    importance = _sensitivity(task)
    shares = [nn.Parameter(each[:1].detach() + START_OPEN) for each in task.vectors(0.0)]

    def gates() -> list[Tensor]:
        return [
            cut_through_ranking(each, torch.sigmoid(share)[0] + SLOPE, SLOPE)
            for each, share in zip(importance, shares, strict=True)
        ]

    def removed() -> list[Tensor]:
        return task.removed([torch.sigmoid(share)[0] for share in shares])

    with gated(task.model, task.groups, gates):
        task.train(shares, task.steps, OverBudget(task.budget(), removed))
    with torch.no_grad():
        # how far a unit stands above its group's cut
        above = [
            torch.sigmoid(share) - (each.argsort(descending=True, stable=True).argsort() + 0.5) / len(each)
            for each, share in zip(importance, shares, strict=True)
        ]
    return Learned(above, [torch.ones_like(each) for each in above])


def learn_decorator(task: Task) -> Learned:
    """Cycles of two phases: gates are scored and the units of least |gate · ∂L/∂gate| removed; then the rest recovers.

    Source: You et al., arXiv 1909.08174 (Gate Decorator). Differs: few cycles of equal length, and no penalty.
    """
    alive = [torch.ones(group.units) for group in task.groups]
    priorities: list[Tensor] = []
    for cycle in range(CYCLES):
        scores = _sensitivity(task, alive)
        kept = task.kept(scores, (cycle + 1) / CYCLES)
        priorities = scores
        alive = [each.to(score) * stay.to(score) for each, score, stay in zip(alive, scores, kept, strict=True)]
        with gated(task.model, task.groups, lambda now=tuple(alive): now):  # type: ignore[misc]
            task.train([], max(task.steps // CYCLES, 1), None, f" cycle {cycle + 1} of {CYCLES}")
    return Learned(priorities, alive)


KINDS: Mapping[str, Callable[[Task], Learned]] = MappingProxyType(
    {
        "hard_concrete": learn_hard_concrete,
        "slimming": learn_slimming,
        "group_lasso": learn_group_lasso,
        "dsa": learn_dsa,
        "decorator": learn_decorator,
    }
)


def _sensitivity(task: Task, alive: Sequence[Tensor] | None = None) -> list[Tensor]:
    """|gate · ∂L/∂gate| per weight of a unit, summed over batches; below everything where a unit is gone already."""
    ones = task.vectors(1.0)
    held = ones if alive is None else [each.to(one) for each, one in zip(alive, ones, strict=True)]
    totals = [torch.zeros_like(each) for each in ones]
    for one, total in zip(ones, totals, strict=True):
        one.register_hook(lambda gradient, into=total: into.add_(gradient.abs()))  # type: ignore[no-untyped-call]
    with gated(task.model, task.groups, lambda: [one * hold for one, hold in zip(ones, held, strict=True)]):
        task.measure()
    return [
        (total / group.parameters).masked_fill(hold == 0, -1.0).detach()
        for total, group, hold in zip(totals, task.groups, held, strict=True)
    ]


def _squares(model: nn.Module, group: UnitGroup) -> Tensor:
    """The sum of the squared weights of every unit."""
    total: Tensor | None = None
    for part in group.parts:
        along = _along(model, group, part)
        owner = group.unit_of(part, len(along), along.device)
        found = per_unit(along, owner, group.units)
        total = found if total is None else total + found
    assert total is not None
    return total


def _along(model: nn.Module, group: UnitGroup, part: WidthPart) -> Tensor:
    """Squares of a weight summed over everything but the part's axis."""
    weight = model.get_submodule(group.block.full(part.site)).get_parameter("weight")
    transposed = group.block.structure.site(part.site).transposed
    return weight.square().sum(int((part.axis == "rows") != transposed))
