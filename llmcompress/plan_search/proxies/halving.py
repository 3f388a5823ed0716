"""Successive halving: all plans are judged on few tokens, the best of them on more."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterable, Sequence

from llmcompress.plan_search.plan_space import Plan
from llmcompress.plan_search.problem import Outcome, Proposal
from llmcompress.plan_search.proxies.correlation import RankCorrelation, rank_correlation


def successive_halving(
    plans: Iterable[Plan], stages: Sequence[int], *, keep: float = 1 / 3
) -> Generator[Sequence[Proposal], Sequence[Outcome], list[Outcome]]:
    """Proposals stage after stage, as an optimizer makes them; returns the outcomes of the last stage, best first.

    `survivors = yield from successive_halving(plans, problem.stages)`. After every stage the best `keep` of the plans
    stay, at least one; plans that failed never do.

    Source: Jamieson and Talwalkar, arXiv 1502.07943; η = 3 as in Li et al., arXiv 1603.06560 (Hyperband).
    """
    alive, ranked = list(dict.fromkeys(plans)), list[Outcome]()
    for tokens in stages:
        outcomes = yield [Proposal(plan, tokens) for plan in alive]
        ranked = sorted((each for each in outcomes if each.is_valid), key=lambda outcome: outcome.loss)
        alive = [each.plan for each in ranked[: max(1, math.ceil(keep * len(ranked)))]]
        if not alive:
            break
    return ranked


def stage_correlations(outcomes: Iterable[Outcome]) -> dict[tuple[int, int], RankCorrelation]:
    """Of every two successive stages: do fewer tokens order plans as more do? On the plans that were judged at both.

    Survivors are alike, so this is less than the correlation over all plans.
    """
    by_stage: dict[int, dict[Plan, float]] = {}
    for each in outcomes:
        if each.is_valid:
            by_stage.setdefault(each.tokens, {})[each.plan] = each.loss
    stages = sorted(by_stage)
    found = {}
    for few, many in itertools.pairwise(stages):
        both = by_stage[few].keys() & by_stage[many].keys()
        if len(both) > 1:
            pairs = [(by_stage[few][plan], by_stage[many][plan]) for plan in sorted(both)]
            found[few, many] = rank_correlation(*zip(*pairs, strict=True))
    return found
