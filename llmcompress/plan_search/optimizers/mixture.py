"""Mixtures of options: shares that sum to 1 at every unit, their expected cost, and steps of Adam on their logits.

L = logits of all units one after the other, A = limits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llmcompress.errors import CompressError, ExitCode
from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.optimizers.additive_optimum import least_loss
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.problem import Problem, Relaxation

_BISECTIONS = 60
_FARTHEST = 1e4
"""Of a shift of logits along costs, relative to the largest cost of an option."""


def relaxation_of(problem: Problem, optimizer: str) -> Relaxation:
    """The problem's relaxation.

    Raises: CompressError where it has none.
    """
    if problem.relaxation is None:
        raise CompressError(
            "search.no-relaxation",
            f"{optimizer} follows gradients, and this search has no mixture of options to take them from",
            fix="choose an optimizer that judges plans only, such as evopress",
            exit_code=ExitCode.USAGE,
        )
    return problem.relaxation


class Logits:
    """How logits of all units lie one after the other."""

    def __init__(self, space: PlanSpace) -> None:
        self.space = space
        counts = [len(unit.options) for unit in space.units]
        self._starts = np.cumsum([0, *counts[:-1]])
        self._unit_L = np.repeat(np.arange(len(counts)), counts)
        self.size = int(sum(counts))

    def softmax(self, logits_L: np.ndarray) -> np.ndarray:
        """Shares: at every unit they sum to 1."""
        top_U = np.maximum.reduceat(logits_L, self._starts)
        exponential_L = np.exp(logits_L - top_U[self._unit_L])
        return np.asarray(exponential_L / np.add.reduceat(exponential_L, self._starts)[self._unit_L])

    def through_softmax(self, shares_L: np.ndarray, gradient_L: np.ndarray) -> np.ndarray:
        """The gradient in logits of what has this gradient in shares."""
        mean_U = np.add.reduceat(shares_L * gradient_L, self._starts)
        return np.asarray(shares_L * (gradient_L - mean_U[self._unit_L]))

    def split(self, values_L: np.ndarray) -> list[np.ndarray]:
        """One array per unit."""
        return np.split(values_L, self._starts[1:])

    def one_hot(self, plan: Plan) -> np.ndarray:
        """All of the share on the options of one plan."""
        found = np.zeros(self.size)
        found[self._starts + np.array(plan)] = 1.0
        return found

    def likeliest(self, logits_L: np.ndarray, problem: Problem) -> Plan | None:
        """Of the plans within the limits the one whose options have the most likelihood; None where no plan fits.

        The sites of a dropped block have their likeliest options, whatever they are: it is neither better nor worse
        for them.
        """
        rows = self.split(-np.log(np.maximum(self.softmax(logits_L), 1e-300)))
        units, bodies = self.space.units, len(self.space.space.bodies)
        of_unit = {index: row.copy() for index, row in enumerate(rows) if units[index].body is None}
        of_sites = {index: np.tile(row, (bodies, 1)) for index, row in enumerate(rows) if units[index].body is not None}
        for body in self.space.bodies:
            of_unit[body][bodies:] += sum(float(rows[site].min()) for site in self.space.inside(body))
        return least_loss(self.space, Additive(0.0, of_unit, of_sites), problem.costs, problem.limits)


def expected(space: PlanSpace, each: Additive, shares: Sequence[np.ndarray]) -> tuple[float, list[np.ndarray]]:
    """The mean of a sum over units when every unit draws its option by its shares, and its gradient in the shares."""
    bodies, mean = len(space.space.bodies), each.base
    gradient = [np.zeros(len(unit.options)) for unit in space.units]
    for index, values in each.of_unit.items():
        mean += float(values @ shares[index])
        gradient[index] += values
    for index, values_BO in each.of_sites.items():
        body = space.units[index].body
        assert body is not None
        with_body = shares[body][:bodies]
        mean += float(with_body @ values_BO @ shares[index])
        gradient[index] += with_body @ values_BO
        gradient[body][:bodies] += values_BO @ shares[index]
    return mean, gradient


class ExpectedCosts:
    """Expected costs by their limits, and the logits that keep them."""

    def __init__(self, problem: Problem, logits: Logits) -> None:
        self._space, self._logits = problem.space, logits
        self._costs = [(problem.costs[axis], limit) for axis, limit in problem.limits.items() if axis in problem.costs]

    def shares(self, logits_L: np.ndarray) -> np.ndarray:
        """A: expected cost ÷ limit."""
        parts = self._logits.split(self._logits.softmax(logits_L))
        return np.array([expected(self._space, each, parts)[0] / limit for each, limit in self._costs])

    def normals(self, logits_L: np.ndarray) -> np.ndarray:
        """A × L: gradients of these in the logits."""
        shares_L = self._logits.softmax(logits_L)
        parts = self._logits.split(shares_L)
        rows = [
            self._logits.through_softmax(shares_L, np.concatenate(expected(self._space, each, parts)[1]) / limit)
            for each, limit in self._costs
        ]
        return np.array(rows).reshape(len(rows), self._logits.size)

    def tangent(self, logits_L: np.ndarray, direction_L: np.ndarray) -> np.ndarray:
        """The direction without what changes the costs that have reached their limits."""
        at_limit = self.shares(logits_L) > 1.0 - 1e-3
        normals_AL = self.normals(logits_L)[at_limit]
        if not len(normals_AL):
            return direction_L
        part, *_ = np.linalg.lstsq(normals_AL.T, direction_L, rcond=None)
        return np.asarray(direction_L - normals_AL.T @ part)

    def retracted(self, logits_L: np.ndarray) -> np.ndarray:
        """Logits shifted along the costs, so that the limits are kept and the tightest is reached exactly."""
        for _ in range(len(self._costs)):  # one shift can raise another axis: repeat
            shares_A = self.shares(logits_L)
            if not shares_A.size or abs(shares_A.max() - 1.0) < 1e-9:
                break
            axis = int(shares_A.argmax())
            logits_L = self._shifted(logits_L, axis)
        return logits_L

    def _shifted(self, logits_L: np.ndarray, axis: int) -> np.ndarray:
        """Bisection: a shift along the costs changes the expected cost monotonically.

        Source: Helcig, Alistarh, arXiv 2605.00649, the retraction of its budget manifold.
        """
        each, _limit = self._costs[axis]
        parts = self._logits.split(self._logits.softmax(logits_L))
        direction_L = np.concatenate(expected(self._space, each, parts)[1])
        direction_L /= np.abs(direction_L).max() or 1.0

        def over(shift: float) -> float:
            return float(self.shares(logits_L + shift * direction_L)[axis]) - 1.0

        low, high = _bracket(over)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if over(middle) > 0 else (middle, high)
        return np.asarray(logits_L + low * direction_L)


def _bracket(over: Callable[[float], float]) -> tuple[float, float]:
    """A shift that keeps the limit and one that does not; no shift where the limit is never reached."""
    step = 1.0
    if over(0.0) > 0:
        while over(-step) > 0 and step < _FARTHEST:
            step *= 4.0
        return -step, 0.0
    while over(step) <= 0 and step < _FARTHEST:
        step *= 4.0
    return 0.0, step if over(step) > 0 else 0.0


class Adam:
    """Kingma, Ba, arXiv 1412.6980, on one array."""

    def __init__(self, size: int, rate: float) -> None:
        self.mean_L, self._square_L, self._rate, self._steps = np.zeros(size), np.zeros(size), rate, 0

    def step(self, gradient_L: np.ndarray) -> np.ndarray:
        """What is to be added."""
        self._steps += 1
        self.mean_L = 0.9 * self.mean_L + 0.1 * gradient_L
        self._square_L = 0.999 * self._square_L + 0.001 * gradient_L**2
        mean_L, square_L = self.mean_L / (1 - 0.9**self._steps), self._square_L / (1 - 0.999**self._steps)
        return np.asarray(-self._rate * mean_L / (np.sqrt(square_L) + 1e-8))
