"""A tabular benchmark: plans of a small space measured once, so that optimizers are compared in seconds.

P = plans, U = units, S = stages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from llmcompress.model.map import BlockStructure, ModelMap
from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.problem import Outcome, Problem, Proposal, Relaxation, exceeded
from llmcompress.plan_search.proxies.correlation import RankCorrelation, held_out_losses, rank_correlation
from llmcompress.plan_search.proxies.predictors.base import PREDICTORS, PlanForecast, fit_plans
from llmcompress.plan_search.space import Space

_MAP: TypeAdapter[ModelMap] = TypeAdapter(ModelMap)


@dataclass(frozen=True, eq=False)
class Table:
    """Plans of a space with what was measured of them: all legal ones, unless a `Surrogate` is made of it.

    In the role of NAS-Bench-101 and 201.
    """

    space: PlanSpace
    stages: tuple[int, ...]
    """Tokens on which losses were measured, few first."""
    plans_PU: np.ndarray
    losses_PS: np.ndarray
    """Mean KL divergence from the dense model per token, in nats."""
    costs: Mapping[str, Additive]
    estimate: Additive
    """Of the loss, from gradients: what optimizers of sums go by."""
    facts: Mapping[str, Any]
    """Where it comes from: model, texts, commands."""

    def __post_init__(self) -> None:
        assert self.losses_PS.shape == (len(self.plans_PU), len(self.stages))

    @cached_property
    def _rows(self) -> dict[Plan, int]:
        return {tuple(int(choice) for choice in plan): row for row, plan in enumerate(self.plans_PU)}

    @cached_property
    def _relaxations(self) -> dict[int, MeanOfPlans]:
        return {tokens: MeanOfPlans(self, tokens) for tokens in self.stages}

    def has(self, plan: Plan) -> bool:
        """Whether it was measured."""
        return self.space.canonical(plan) in self._rows

    def loss(self, plan: Plan, tokens: int) -> float:
        """What was measured."""
        return float(self.losses_PS[self._rows[self.space.canonical(plan)], self.stages.index(tokens)])

    def judge(self, proposal: Proposal) -> Outcome:
        """The outcome, at once."""
        costs = {axis: each.total(self.space, proposal.plan) for axis, each in self.costs.items()}
        return Outcome(proposal.plan, proposal.tokens, self.loss(proposal.plan, proposal.tokens), costs)

    def problem(self, limits: Mapping[str, float], *, stages: Sequence[int] = ()) -> Problem:
        """A search in this table; stages, by default all, are some of its own."""
        return Problem(
            space=self.space,
            costs=self.costs,
            limits=limits,
            stages=tuple(stages) or self.stages,
            losses=self.estimate,
            relaxation=self._relaxations[(tuple(stages) or self.stages)[0]],
            starts=tuple(self.space.uniform(option) for option in self.space.space.sites),
        )

    def least(self, limits: Mapping[str, float], tokens: int) -> Outcome:
        """The best plan within the limits; every plan is looked at."""
        outcomes = [self.judge(Proposal(plan, tokens)) for plan in self._rows]
        return min((each for each in outcomes if not exceeded(each.costs, limits)), key=lambda each: each.loss)

    def write(self, file: Path) -> None:
        """One file of arrays, with the rest as JSON text inside."""
        found = replace(self.space.model_map, blocks=_without_groups(self.space.model_map))
        header = {
            "space": self.space.space.model_dump(mode="json"),
            "map": _MAP.dump_python(found, mode="json"),
            "costs": {axis: _as_lists(each) for axis, each in self.costs.items()},
            "estimate": _as_lists(self.estimate),
            "stages": self.stages,
            "facts": self.facts,
        }
        np.savez_compressed(
            file,
            header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
            plans=self.plans_PU.astype(np.uint8),
            losses=self.losses_PS.astype(np.float32),
        )

    @staticmethod
    def read(file: Path) -> Table:
        """The table again."""
        with np.load(file) as arrays:
            header = json.loads(arrays["header"].tobytes())
            return Table(
                PlanSpace(Space.model_validate(header["space"]), _MAP.validate_python(header["map"])),
                tuple(header["stages"]),
                arrays["plans"].astype(np.int64),
                arrays["losses"].astype(np.float64),
                {axis: _additive(each) for axis, each in header["costs"].items()},
                _additive(header["estimate"]),
                header["facts"],
            )


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A space too large to measure: some plans are measured, the loss of others is predicted from these.

    In the role of NAS-Bench-301 (arXiv 2008.09777). What is smooth in it need not be smooth in the model.
    """

    measured: Table
    """Plans drawn at random."""
    forecast: PlanForecast
    quality: RankCorrelation
    """Of plans that the forecast has not seen, each predicted from the others."""

    @staticmethod
    def of(measured: Table, *, predictor: str = "mlp", seed: int = 0) -> Surrogate:
        """Learned from the losses on the most tokens, beginning from the estimate that is a sum."""
        plans = [tuple(int(choice) for choice in plan) for plan in measured.plans_PU]
        losses, learner = measured.losses_PS[:, -1].tolist(), PREDICTORS[predictor]()
        space, start = measured.space, measured.estimate
        held_out = held_out_losses(learner, space, plans, losses, start=start)
        forecast = fit_plans(learner, space, plans, losses, start=start, seed=seed)
        return Surrogate(measured, forecast, rank_correlation(held_out, losses))

    def judge(self, proposal: Proposal) -> Outcome:
        """What was measured, or else what is predicted."""
        if self.measured.has(proposal.plan):
            return self.measured.judge(proposal)
        costs = {axis: each.total(self.measured.space, proposal.plan) for axis, each in self.measured.costs.items()}
        return Outcome(proposal.plan, proposal.tokens, float(self.forecast.losses([proposal.plan])[0]), costs)

    def problem(self, limits: Mapping[str, float]) -> Problem:
        """A search in this space; without a relaxation."""
        return Problem(
            space=self.measured.space,
            costs=self.measured.costs,
            limits=limits,
            stages=self.measured.stages[-1:],
            losses=self.measured.estimate,
            starts=tuple(self.measured.space.uniform(option) for option in self.measured.space.space.sites),
        )


class MeanOfPlans(Relaxation):
    """The mean loss when every unit draws its option by its shares, and its exact gradient.

    It stands in for the relaxation of a real search, which mixes the options' weights: both are the plan's own loss
    where all of the share is on one plan, in between they differ. Plans that are not legal have the worst loss.
    """

    def __init__(self, table: Table, tokens: int) -> None:
        self.tokens = tokens
        space = table.space
        self._free = space.free
        worst = float(table.losses_PS[:, table.stages.index(tokens)].max())
        shape = [len(space.units[unit].options) for unit in self._free]
        self._losses = np.full(shape, worst)
        plan = [0] * len(space.units)
        for choices in product(*(range(count) for count in shape)):
            for unit, choice in zip(self._free, choices, strict=True):
                plan[unit] = choice
            if space.is_legal(tuple(plan)):
                self._losses[choices] = table.loss(tuple(plan), tokens)
        self._options = [len(unit.options) for unit in space.units]

    def loss_and_gradient(self, mixture: Sequence[np.ndarray], step: int) -> tuple[float, list[np.ndarray]]:
        """`step` changes nothing: all of the text counts."""
        shares = [mixture[unit] for unit in self._free]
        gradient = [np.zeros(count) for count in self._options]
        left = self._losses  # the units in front are summed over already
        for place, unit in enumerate(self._free):
            rest = left
            for later in reversed(shares[place + 1 :]):
                rest = rest @ later
            gradient[unit] = rest
            left = np.tensordot(shares[place], left, 1)
        return float(left), gradient


def all_plans(space: PlanSpace) -> np.ndarray:
    """P × U: every legal plan once, in an order in which neighbours begin alike."""
    plans = product(*(range(len(unit.options)) for unit in space.units))
    return np.array([plan for plan in plans if space.is_legal(plan) and space.canonical(plan) == plan])


def _without_groups(found: ModelMap) -> tuple[Any, ...]:
    """Blocks whose structure has nothing that a plan does not need."""
    plain = [
        replace(block, structure=BlockStructure(block.structure.sites, block.structure.groups, (), ()))
        for block in found.blocks
    ]
    return tuple(plain)


def _as_lists(each: Additive) -> dict[str, Any]:
    return {
        "base": each.base,
        "of_unit": {unit: row.tolist() for unit, row in each.of_unit.items()},
        "of_sites": {unit: rows.tolist() for unit, rows in each.of_sites.items()},
    }


def _additive(lists: Mapping[str, Any]) -> Additive:
    return Additive(
        lists["base"],
        {int(unit): np.array(row) for unit, row in lists["of_unit"].items()},
        {int(unit): np.array(rows) for unit, rows in lists["of_sites"].items()},
    )
