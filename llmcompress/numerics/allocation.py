"""Allocates one budget among many items, each with a few options of known size and loss."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

MOST_CELLS = 1 << 26
"""Of the exact table, items · sizes; above it the budget is spent by slopes."""


class Option(NamedTuple):
    """What one choice takes, and what is lost with it."""

    size: int
    loss: float


def allocate(options: Sequence[Sequence[Option]], budget: int, *, at_least: int = 0) -> list[int]:
    """Which option each item gets, so that the sizes fit the budget and the losses sum to the least.

    The sum is found exactly (a multiple-choice knapsack over all sums of sizes) where the table is not too large, else
    as `spend` does. Sums of sizes below `at_least` are taken only where none above fits.

    Raises: ValueError when not even the smallest options fit.
    """
    smallest = [min(option.size for option in each) for each in options]
    left = budget - sum(smallest)
    if left < 0:
        raise ValueError(f"the least options need {sum(smallest)}, the budget is {budget}")
    extra = [[option.size - least for option in each] for each, least in zip(options, smallest, strict=True)]
    unit = gcd(*(size for each in extra for size in each)) or 1
    most = min(left, sum(map(max, extra))) // unit
    if len(options) * (most + 1) > MOST_CELLS:
        return spend(options, budget)
    least_P = torch.full((most + 1,), torch.inf, dtype=torch.float64)
    least_P[0] = 0.0
    choices: list[Tensor] = []
    for each, sizes in zip(options, extra, strict=True):
        tried_CP = torch.full((len(each), most + 1), torch.inf, dtype=torch.float64)
        for index, (option, size) in enumerate(zip(each, sizes, strict=True)):
            if size // unit <= most:
                tried_CP[index, size // unit :] = least_P[: most + 1 - size // unit] + option.loss
        least_P, chosen_P = tried_CP.min(0)
        choices.append(chosen_P.to(torch.int16))
    floor = min(max(0, -(-(at_least - sum(smallest)) // unit)), most)
    place = floor + int(least_P[floor:].argmin())
    if torch.isinf(least_P[place]):
        place = int(least_P.argmin())
    found: list[int] = []
    for chosen_P, sizes in zip(reversed(choices), reversed(extra), strict=True):
        found.append(int(chosen_P[place]))
        place -= sizes[found[-1]] // unit
    return found[::-1]


def spend(options: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The same up to one step: steps are taken in order of what they gain per size, until nothing more fits.

    Options of an item stand in order of size. Where losses are not convex several steps are taken as one. What is left
    goes to the best single steps that fit. Raises: ValueError when not even the first options fit.
    """
    chosen = [0] * len(options)
    left = budget - sum(each[0].size for each in options)
    if left < 0:
        raise ValueError(f"the least options need {budget - left}, the budget is {budget}")
    steps = [(item, *step) for item, each in enumerate(options) for step in pairwise(lower_convex_hull(each))]
    for item, before, after in sorted(steps, key=lambda step: _gain(options[step[0]], *step[1:]), reverse=True):
        size = options[item][after].size - options[item][before].size
        if chosen[item] == before and size <= left:
            left -= size
            chosen[item] = after
    while True:
        fitting = [
            (_gain(each, chosen[item], index), item, index)
            for item, each in enumerate(options)
            for index, option in enumerate(each)
            if 0 < option.size - each[chosen[item]].size <= left and option.loss < each[chosen[item]].loss
        ]
        if not fitting:
            return chosen
        _, item, index = max(fitting, key=lambda found: found[0])
        left -= options[item][index].size - options[item][chosen[item]].size
        chosen[item] = index


def lower_convex_hull(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points (in order of their first number) are corners of the convex curve below them all."""
    found: list[int] = []
    for index, point in enumerate(points):
        while len(found) > 1 and _turns_down(points[found[-2]], points[found[-1]], point):
            found.pop()
        found.append(index)
    return found


def _turns_down(first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]) -> bool:
    """Whether the middle point lies on or above the line between the others."""
    rise, run = last[1] - first[1], last[0] - first[0]
    return (middle[1] - first[1]) * run >= rise * (middle[0] - first[0])


def _gain(options: Sequence[Option], before: int, after: int) -> float:
    """What is gained per size by going from one option to a larger one."""
    return (options[before].loss - options[after].loss) / (options[after].size - options[before].size)
