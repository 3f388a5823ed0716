"""A search without a model: made-up blocks, costs and losses that are sums, and a driver that answers at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from llmcompress.model.map import BlockInfo, BlockStructure, InputGroup, ModelMap, SiteInfo
from llmcompress.plan_search.additive import Additive
from llmcompress.plan_search.optimizers.base import AskTell, Optimizer
from llmcompress.plan_search.optimizers.mixture import expected
from llmcompress.plan_search.plan_space import Plan, PlanSpace
from llmcompress.plan_search.problem import Outcome, Problem, Proposal, Relaxation
from llmcompress.plan_search.space import Space

GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
SITES = {
    "int8": [{"rtn": {"scheme": "int8_g32"}}],
    "int4": [{"rtn": {"scheme": "int4_g32"}}],
    "int3": [{"rtn": {"scheme": "int3_g32"}}],
    "int2": [{"rtn": {"scheme": "int2_g32"}}],
}
BITS = {"int8": 8.0, "int4": 4.5, "int3": 3.5, "int2": 2.5}


def plan_space(*, blocks: int = 4, per: str = "block", options: int = 3, most_dropped: float = 0.25) -> PlanSpace:
    """Blocks of four groups of linears, with half of the FFN or all of it."""
    sites = tuple(SiteInfo(site, 8, 8, False) for group in GROUPS for site in group)
    structure = BlockStructure(sites, tuple(InputGroup(group) for group in GROUPS), (), ())
    infos = tuple(BlockInfo(index, f"layers.{index}", structure) for index in range(blocks))
    space = Space.model_validate(
        {
            "sites": dict(list(SITES.items())[:options]),
            "per": per,
            "bodies": {"whole": [], "ffn-50": [{"width": {"fraction": 0.5, "heads": False}}]},
            "most_dropped": most_dropped,
        }
    )
    return PlanSpace(space, ModelMap("toy", 8, infos, "embedding", "head", True))


def sizes(space: PlanSpace, seed: int = 0, noise: float = 0.0) -> Additive:
    """Bits of all linears; with noise: seconds, which do not quite follow them."""
    random = np.random.default_rng(seed)
    width = {"whole": 1.0, "ffn-50": 0.6}
    of_sites = {
        index: np.array(
            [
                [
                    width[body] * BITS[option] * len(unit.sites) * np.exp(noise * random.standard_normal())
                    for option in unit.options
                ]
                for body in space.space.bodies
            ]
        )
        for index, unit in enumerate(space.units)
        if unit.body is not None
    }
    return Additive(40.0, {}, of_sites)


def losses(space: PlanSpace, seed: int = 0) -> Additive:
    """More for fewer bits, for half of the FFN and for dropping, in each unit differently much."""
    random = np.random.default_rng(seed + 1000)
    of_unit, of_sites = {}, {}
    for index, unit in enumerate(space.units):
        scale = np.exp(random.standard_normal())
        if unit.kind == "body":
            of_unit[index] = np.array([0.0, 0.08 * scale, 0.6 * scale])[: len(unit.options)]
        elif unit.body is not None:
            row = scale * np.array([2.0 ** -BITS[option] for option in unit.options])
            of_sites[index] = np.stack([row, row * np.exp(0.2 * random.standard_normal(row.size))])
    return Additive(0.01, of_unit, of_sites)


class SummedRelaxation(Relaxation):
    """The mean of summed losses when every unit draws its option: its gradient is exact."""

    tokens = 1

    def __init__(self, space: PlanSpace, each: Additive) -> None:
        self._space, self._losses = space, each

    def loss_and_gradient(self, mixture: Sequence[np.ndarray], step: int) -> tuple[float, list[np.ndarray]]:
        return expected(self._space, self._losses, mixture)


def problem(space: PlanSpace, *, seed: int = 0, share: float = 0.55, stages: tuple[int, ...] = (1,)) -> Problem:
    """Bits and seconds, bits limited to a share of the dearest plan's."""
    costs = {"bytes": sizes(space, seed), "decode": sizes(space, seed, noise=0.2)}
    most = costs["bytes"].total(space, (0,) * len(space.units))
    estimate = losses(space, seed)
    return Problem(
        space=space,
        costs=costs,
        limits={"bytes": share * most},
        stages=stages,
        losses=estimate,
        relaxation=SummedRelaxation(space, estimate),
        starts=tuple(space.uniform(option) for option in space.space.sites),
    )


def all_plans(space: PlanSpace) -> Iterator[Plan]:
    """Every legal plan once."""
    plans = product(*(range(len(unit.options)) for unit in space.units))
    return (plan for plan in plans if space.is_legal(plan) and space.canonical(plan) == plan)


def answer(task: Problem, proposal: Proposal) -> Outcome:
    """The summed loss."""
    assert task.losses is not None
    loss = task.losses.total(task.space, proposal.plan)
    return Outcome(proposal.plan, proposal.tokens, loss, task.cost(proposal.plan))


def searched(optimizer: Optimizer, task: Problem, *, seed: int = 0) -> list[Outcome]:
    """All outcomes, in order."""
    asking, found = AskTell(optimizer, task, seed=seed), list[Outcome]()
    while asked := asking.ask():
        told = [answer(task, each) for each in asked]
        asking.tell(told)
        found += told
    return found


def least(task: Problem, outcomes: Sequence[Outcome]) -> float:
    """The least loss of a plan within the limits."""
    return min((each.loss for each in outcomes if task.fits(each.plan)), default=float("inf"))
