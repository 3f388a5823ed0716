"""What an optimizer sees of a search: the space, costs that can be asked for freely, limits, and how plans are judged.

An optimizer proposes plans and is told outcomes. It never touches a model, so that it can be tried on a table.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.plan_space import Plan, PlanSpace

ROUNDING = 1e-9
"""A share by which a sum may exceed its limit: sums of the same numbers in another order end in other digits."""


@dataclass(frozen=True)
class Proposal:
    """A plan to be judged on so many tokens."""

    plan: Plan
    tokens: int


@dataclass(frozen=True)
class Outcome:
    """What was found of a plan."""

    plan: Plan
    tokens: int
    """On which `loss` was measured."""
    loss: float
    """Mean KL divergence from the dense model per token, in nats; infinite for a plan that failed or is not finite."""
    costs: Mapping[str, float] = field(default_factory=dict)
    """`bytes`, `prefill` and `decode` (seconds per token), `memory` (bytes), `energy` (joules per token): what is
    known."""
    problem: str | None = None
    """Why it failed."""

    @property
    def is_valid(self) -> bool:
        """Whether it can be compared."""
        return self.problem is None and math.isfinite(self.loss)


class Relaxation(ABC):
    """The model with a mixture of options at every unit, for optimizers that follow gradients."""

    tokens: int
    """Forward tokens that one call takes; a backward pass counts as two more of them."""

    @abstractmethod
    def loss_and_gradient(self, mixture: Sequence[np.ndarray], step: int) -> tuple[float, list[np.ndarray]]:
        """The loss, and its gradient in the share of every option of every unit; `step` chooses the text.

        The weight of a site is the mixture of its options' weights; a block is kept with the share of its bodies.
        """


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One search."""

    space: PlanSpace
    costs: Mapping[str, Additive]
    """Axis → what each choice adds."""
    limits: Mapping[str, float]
    """Axis → the most a plan may cost; for others there is no limit."""
    stages: tuple[int, ...] = (2048, 16384, 131072)
    """Tokens on which plans are judged, few first; an optimizer judges all at the first and few at the last."""
    losses: Additive | None = None
    """An estimate of the loss that is a sum over units, from one stream; None: there is none."""
    relaxation: Relaxation | None = None
    starts: tuple[Plan, ...] = ()
    """Plans to begin with, such as uniform ones."""

    def cost(self, plan: Plan) -> dict[str, float]:
        """What is known without judging."""
        return {axis: each.total(self.space, plan) for axis, each in self.costs.items()}

    def fits(self, plan: Plan) -> bool:
        """Whether it is legal and keeps all limits."""
        return self.space.is_legal(plan) and not self.excess(plan)

    def excess(self, plan: Plan) -> float:
        """By which share the limits are exceeded, summed; 0 when all are kept."""
        return exceeded(self.cost(plan), self.limits)


def exceeded(costs: Mapping[str, float], limits: Mapping[str, float]) -> float:
    """By which share costs exceed their limits, summed; 0 up to rounding."""
    over = (costs[axis] / limit - 1.0 for axis, limit in limits.items() if axis in costs)
    return sum(share for share in over if share > ROUNDING)
