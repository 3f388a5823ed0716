"""Which plan is taken: Pareto fronts, their hypervolume, and rules that choose one point of a front."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from llmcompress.plan_search.problem import Outcome, exceeded
from llmcompress.registry import Registry

LOSS = "loss"
"""The axis of `Outcome.loss`; others are those of `Outcome.costs`."""


def value(outcome: Outcome, axis: str) -> float:
    """Of one axis; less is better."""
    return outcome.loss if axis == LOSS else outcome.costs[axis]


def comparable(outcomes: Sequence[Outcome], limits: Mapping[str, float]) -> list[Outcome]:
    """The valid ones within the limits that were judged on the most tokens; losses on other texts do not compare."""
    kept = [each for each in outcomes if each.is_valid and exceeded(each.costs, limits) == 0.0]
    most = max((each.tokens for each in kept), default=0)
    return [each for each in kept if each.tokens == most]


def front(outcomes: Sequence[Outcome], axes: Sequence[str]) -> list[Outcome]:
    """Those that no other beats on one axis without being worse on another, by their first axis; equal ones once."""
    from moocore import is_nondominated

    valid = [each for each in outcomes if each.is_valid]
    if not valid:
        return []
    points = np.array([[value(each, axis) for axis in axes] for each in valid])
    kept = [each for each, stays in zip(valid, is_nondominated(points), strict=True) if stays]
    return sorted(kept, key=lambda each: [value(each, axis) for axis in axes])


def hypervolume(outcomes: Sequence[Outcome], reference: Mapping[str, float]) -> float:
    """The volume between a front and a reference point that is worse than it, by axis; more is better."""
    from moocore import hypervolume as volume

    axes = list(reference)
    points = [[value(each, axis) for axis in axes] for each in outcomes if each.is_valid]
    return float(volume(np.array(points), ref=np.array(list(reference.values())))) if points else 0.0


def scalar_reward(outcome: Outcome, targets: Mapping[str, float], *, below: float, above: float) -> float:
    """exp(−loss) · Π (cost ÷ target)^w, with w = `below` for costs within their target and `above` for others.

    Soft: both −0.07, so that halving a cost is worth 5 % of quality. Hard: 0 and −1.
    Source: Tan et al., MnasNet, arXiv 1807.11626, equations 2 and 3, where quality is accuracy. Here it is the
    geometric mean of the ratio of probabilities that the candidate and the dense model give to a token.
    """
    reward = math.exp(-outcome.loss) if outcome.is_valid else 0.0
    for axis, target in targets.items():
        share = outcome.costs[axis] / target
        reward *= share ** (below if share <= 1.0 else above)
    return reward


class Selection(BaseModel, ABC):
    """One rule; the fields are exactly the options that a search file may set."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    only_one: ClassVar[bool] = True
    """In a search file its options stand under its name, without a list."""

    @abstractmethod
    def ordered(self, outcomes: Sequence[Outcome], limits: Mapping[str, float]) -> list[Outcome]:
        """Points of the front among outcomes on equal tokens, the one that is taken first."""

    def pick(self, outcomes: Sequence[Outcome], limits: Mapping[str, float]) -> Outcome | None:
        """The one that is taken; None where no outcome is valid and within the limits."""
        kept = comparable(outcomes, limits)
        return self.ordered(kept, limits)[0] if kept else None


SELECTIONS: Registry[Selection] = Registry("selection", "llmcompress.plan_search.selection")


def axes_of(outcomes: Sequence[Outcome]) -> list[str]:
    """The loss and every cost that is known of all."""
    shared = set.intersection(*(set(each.costs) for each in outcomes))
    return [LOSS, *sorted(shared)]


@SELECTIONS.register("least_loss")
class LeastLoss(Selection):
    """The least loss within the limits."""

    def ordered(self, outcomes: Sequence[Outcome], limits: Mapping[str, float]) -> list[Outcome]:
        """By loss; of equal ones the cheapest."""
        return front(outcomes, axes_of(outcomes))


@SELECTIONS.register("lexicographic")
class Lexicographic(Selection):
    """The first axis counts; points within its tolerance of the best are as good, and the next axis decides."""

    order: tuple[str, ...] = (LOSS, "bytes")
    tolerances: tuple[float, ...] = (0.01,)
    """Of each axis but the last, relative to its best value; missing ones are 0."""

    def ordered(self, outcomes: Sequence[Outcome], limits: Mapping[str, float]) -> list[Outcome]:
        """The chosen point, then the others by the first axis."""
        points = front(outcomes, axes_of(outcomes))
        left = points
        for index, axis in enumerate(self.order):
            tolerance = self.tolerances[index] if index < min(len(self.tolerances), len(self.order) - 1) else 0.0
            least = min(value(each, axis) for each in left)
            left = [each for each in left if value(each, axis) <= least + tolerance * abs(least)]
        rest = sorted(
            (each for each in points if each is not left[0]),
            key=lambda each: [value(each, axis) for axis in self.order],
        )
        return [left[0], *rest]


@SELECTIONS.register("scalarized")
class Scalarized(Selection):
    """One number of all axes: MnasNet's reward, with the limits, or what is given, as targets."""

    kind: Literal["soft", "hard"] = "soft"
    weight: float = Field(default=-0.07, le=0)
    """Exponent of cost ÷ target; for `soft`. MnasNet's −0.07: twice the cost is worth 5 % of quality."""
    targets: dict[str, float] = {}
    """Axis → its target; none: the limits."""

    def ordered(self, outcomes: Sequence[Outcome], limits: Mapping[str, float]) -> list[Outcome]:
        """By reward."""
        targets = self.targets or {axis: limit for axis, limit in limits.items() if axis in axes_of(outcomes)}
        below, above = (self.weight, self.weight) if self.kind == "soft" else (0.0, -1.0)
        points = front(outcomes, axes_of(outcomes))
        return sorted(points, key=lambda each: -scalar_reward(each, targets, below=below, above=above))


@SELECTIONS.register("hybrid")
class Hybrid(Selection):
    """Limits first, then the least loss up to a tolerance, then MnasNet's reward among what is left."""

    tolerance: float = Field(default=0.05, ge=0)
    """Relative to the least loss."""
    scalar: Scalarized = Scalarized()
    """What decides among points of nearly the least loss."""

    def ordered(self, outcomes: Sequence[Outcome], limits: Mapping[str, float]) -> list[Outcome]:
        """Points of nearly the least loss by reward, then the others by loss."""
        points = front(outcomes, axes_of(outcomes))
        near = [each for each in points if each.loss <= points[0].loss * (1.0 + self.tolerance)]
        first = self.scalar.ordered(near, limits)
        return [*first, *(each for each in points if each not in first)]


def better_uniform(chosen: Outcome, uniform: Sequence[Outcome]) -> Outcome | None:
    """The best uniform plan that is cheaper or equal on all axes, on the same tokens, and has less loss; None: none.

    A search must not be worse than one choice for all linears at equal cost; where this finds one, say so and take it.
    """
    rivals = [
        each
        for each in uniform
        if each.is_valid
        and each.tokens == chosen.tokens
        and each.loss < chosen.loss
        and all(each.costs[axis] <= cost for axis, cost in chosen.costs.items() if axis in each.costs)
    ]
    return min(rivals, key=lambda each: each.loss, default=None)
